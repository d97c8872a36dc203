"""Where S3's credentials, region and endpoint come from: the environment, profiles in ~/.aws; on a real S3 server."""

import os
import sys

import pytest
from support.servers.real_store import KEYS

from client.storage.bucket import Bucket, BucketError


@pytest.fixture
def home(s3, tmp_path, monkeypatch):
    """No key, endpoint or region in the environment, and a home without profiles. Returns the server's endpoint."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nor does the machine itself give any
    (tmp_path / ".aws").mkdir()
    return endpoint


def profile(home, name, key, secret, **more):
    settings = {"aws_access_key_id": key, "aws_secret_access_key": secret, **more}
    with home.joinpath(".aws", "credentials").open("a") as file:
        print(f"[{name}]", *(f"{name} = {value}" for name, value in settings.items()), sep="\n", file=file)


def works(url):
    """Whether a put through a new bucket is there for another."""
    name = os.urandom(4).hex()
    Bucket(url).put(name, b"here")
    return Bucket(url).get(name) == b"here"


RIGHT = KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]


def test_the_default_profile_gives_key_region_and_endpoint(s3, home, tmp_path):
    profile(tmp_path, "default", *RIGHT, endpoint_url=home, region="eu-west-1")
    assert works(f"{s3}/aws")


def test_a_profile_is_chosen_by_its_name(s3, home, tmp_path, monkeypatch):
    profile(tmp_path, "default", "stranger", "stranger", endpoint_url=home, region="us-east-1")
    profile(tmp_path, "lab", *RIGHT, endpoint_url=home, region="us-east-1")
    with pytest.raises(BucketError, match=r"InvalidAccessKeyId.*; check the credentials"):
        works(f"{s3}/aws")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert works(f"{s3}/aws")


def test_the_environment_goes_before_the_profile(s3, home, tmp_path, monkeypatch):
    profile(tmp_path, "default", "stranger", "stranger", endpoint_url="http://127.0.0.1:9", region="us-east-1")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", home)
    assert works(f"{s3}/aws")


def test_the_environments_endpoint_goes_before_the_profiles(s3, home, tmp_path, monkeypatch):
    profile(tmp_path, "default", *RIGHT, endpoint_url="http://127.0.0.1:9", region="us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", home)
    assert works(f"{s3}/aws")


def test_without_credentials_it_is_said_where_they_are_looked_for(s3, home):
    with pytest.raises(BucketError, match=r"no AWS credentials were found; set AWS_ACCESS_KEY_ID .* AWS_PROFILE"):
        Bucket(f"{s3}/aws")


def test_a_profile_that_is_not_there_is_named(s3, home, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(BucketError, match=r"config profile \(nosuch\) could not be found"):
        Bucket(f"{s3}/aws")


def test_an_endpoint_without_a_scheme_is_named(s3, home, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:8333")
    with pytest.raises(BucketError, match=r"AWS_ENDPOINT_URL, is '127.0.0.1:8333'; it must begin with http://"):
        Bucket(f"{s3}/aws")


@pytest.fixture
def without_boto3(monkeypatch):
    """A machine on which the extra `aws` is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("boto3", "botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)


def test_keys_region_and_endpoint_of_the_environment_need_no_boto3(s3, home, monkeypatch, without_boto3):
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": home, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    assert works(f"{s3}/aws")


def test_a_profile_without_boto3_is_an_error_that_names_the_extra(s3, home, tmp_path, monkeypatch, without_boto3):
    profile(tmp_path, "lab", *RIGHT, endpoint_url=home, region="us-east-1")
    with pytest.raises(BucketError, match=r"no AWS key is set, .*pip install 'lightreasoner\[aws\]'"):
        Bucket(f"{s3}/aws")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(BucketError, match=r"AWS_PROFILE=lab, and boto3 is not installed.*lightreasoner\[aws\]"):
        Bucket(f"{s3}/aws")
