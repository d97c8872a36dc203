"""Endpoint, region and credentials of an s3:// store, from the places where AWS's own tools look.

In: the environment and the profiles in ~/.aws. Out: options for obstore. obstore itself reads a key, an endpoint and a
region from the environment; profiles, roles and single sign-on need boto3 (extra `aws`). Never opens a store.
"""

from __future__ import annotations

import os
from typing import Any

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
READ_BY_OBSTORE = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""If one of these is in the environment, obstore finds the credentials itself."""


class AwsError(Exception):
    """Settings for AWS are missing or invalid."""


def s3_options() -> dict[str, Any]:
    """Keyword arguments for obstore's S3 store. Raises AwsError."""
    options = {} if any(os.environ.get(name) for name in READ_BY_OBSTORE) else _from_profile()
    if endpoint := next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), options.get("endpoint")):
        if not endpoint.startswith(("http://", "https://")):
            raise AwsError(f"its endpoint, AWS_ENDPOINT_URL, is {endpoint!r}; it must begin with http:// or https://")
        options |= {"endpoint": endpoint, "client_options": {"allow_http": endpoint.startswith("http://")}}
    return options


def _from_profile() -> dict[str, Any]:
    """Credentials of a profile, a role, a single sign-on or the machine; boto3 renews them."""
    try:
        from botocore.exceptions import BotoCoreError  # slow to import, and of use here alone
        from botocore.session import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError as error:
        asked = f"AWS_PROFILE={profile}" if (profile := os.environ.get("AWS_PROFILE")) else "no AWS key is set"
        raise AwsError(
            f"{asked}, and boto3 is not installed: pip install 'lightreasoner[aws]' for profiles, single "
            "sign-on and roles, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error

    try:
        session = Session()
        if session.get_credentials() is None:
            raise AwsError(
                "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a "
                "profile of ~/.aws (AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        options: dict[str, Any] = {"credential_provider": Boto3CredentialProvider(session)}
        profile = session.get_scoped_config()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        return options | {k: v for k, v in (("region", region), ("endpoint", profile.get("endpoint_url"))) if v}
    except BotoCoreError as error:  # a profile that is not there, a file that cannot be read
        raise AwsError(str(error)) from error
