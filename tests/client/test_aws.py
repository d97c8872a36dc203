"""Where S3's credentials, region and endpoint come from: the environment, profiles in ~/.aws; on a real S3 server."""

import os
import ssl
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from support.servers.real_store import KEYS

from client.storage.bucket import Bucket, BucketError
from client.storage.s3_credentials import s3_options

DATE = "Tue, 15 Nov 1994 08:12:31 GMT"


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


def config(home, text):
    home.joinpath(".aws", "config").write_text(text)


def with_keys(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def test_with_a_key_in_the_environment_region_and_endpoint_still_come_from_the_config(s3, home, tmp_path, monkeypatch):
    with_keys(monkeypatch)
    config(tmp_path, f"[default]\nregion = eu-west-1\nendpoint_url = {home}\n")
    assert s3_options()["region"] == "eu-west-1" and works(f"{s3}/aws")
    config(tmp_path, f"[default]\nregion = eu-west-1\n[profile lab]\nregion = us-west-2\nendpoint_url = {home}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert s3_options()["region"] == "us-west-2" and works(f"{s3}/aws")


def test_files_elsewhere_are_found_by_their_variables(home, tmp_path, monkeypatch):
    for name, value in {**KEYS, "AWS_REGION": ""}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").write_text("[default]\nregion = eu-west-3\nendpoint_url = http://127.0.0.1:9\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))  # a folder, as other programs take it
    assert "root_certificate" not in s3_options()["client_options"]
    (tmp_path / "bundle").write_text("certificates")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "bundle"))
    assert s3_options() == {
        "region": "eu-west-3",
        "endpoint": "http://127.0.0.1:9",
        "client_options": {"allow_http": True, "root_certificate": b"certificates"},
    }


@pytest.mark.parametrize("key_from", ["environment", "profile"])
def test_a_services_section_goes_before_its_profile_and_after_the_environment(
    s3, home, tmp_path, monkeypatch, key_from
):
    if key_from == "environment":
        with_keys(monkeypatch)
    else:
        profile(tmp_path, "default", *RIGHT)
    wrong = "http://127.0.0.1:9"
    services = "[services local]\ns3 =\n  endpoint_url = {}\n"
    head = f"[default]\nregion = us-east-1\nservices = local\nendpoint_url = {wrong}\n"
    config(tmp_path, head + services.format(home))
    assert works(f"{s3}/aws")
    config(tmp_path, head + services.format(wrong))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", home)
    assert works(f"{s3}/aws")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert "endpoint" not in s3_options()


@pytest.fixture
def tls(tmp_path):
    """An S3 store behind a certificate that nobody knows: it has an object `there`. Its URL, and the certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", key,
         "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip

    class Store(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in {"content-length": "4", "etag": '"1"', "last-modified": DATE}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}", certificate
    server.shutdown()


def test_a_stores_own_certificate_is_trusted_where_it_is_named_and_else_the_error_says_so(
    home, tls, tmp_path, monkeypatch
):
    url, certificate = tls
    with_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(BucketError, match=r"invalid certificate: \w+; AWS_CA_BUNDLE names") as refused:
        Bucket("s3://any").get("there")
    assert not refused.value.may_pass
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    assert Bucket("s3://any").get("there") == b"here"
    monkeypatch.delenv("AWS_CA_BUNDLE")
    config(tmp_path, f"[default]\nregion = us-east-1\nca_bundle = {certificate}\n")
    assert Bucket("s3://any").get("there") == b"here"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such.pem")
    with pytest.raises(BucketError, match=r"AWS_CA_BUNDLE, /no/such\.pem, cannot be read: No such file"):
        Bucket("s3://any")


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
    for name, value in KEYS.items():  # the profile may name another store
        monkeypatch.setenv(name, value)
    with pytest.raises(BucketError, match=r"AWS_PROFILE=lab, .* or unset AWS_PROFILE and set AWS_ACCESS_KEY_ID"):
        Bucket(f"{s3}/aws")
