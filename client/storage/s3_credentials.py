"""Endpoint, region, certificates and credentials of an s3:// store, from the places where AWS's own tools look.

In: the environment and the files in ~/.aws. Out: options for obstore. obstore itself reads a key and a region from the
environment; botocore (extra `aws`) reads the files, with AWS's own order of precedence. Opens no store.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
READ_BY_OBSTORE = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""If one of these is in the environment, obstore finds the credentials itself."""


class AwsError(Exception):
    """Settings for AWS are missing or invalid."""


def s3_options() -> dict[str, Any]:
    """Keyword arguments for obstore's S3 store. Raises AwsError."""
    has_key = any(os.environ.get(name) for name in READ_BY_OBSTORE)
    session = _session(needed=not has_key or bool(os.environ.get("AWS_PROFILE")))
    options = {} if has_key or session is None else _credentials(session)
    found = _settings_of(session) if session else {}
    if region := os.environ.get("AWS_REGION") or found.get("region"):
        options["region"] = region
    in_environment = (os.environ[name] for name in ENDPOINTS if os.environ.get(name))
    client: dict[str, Any] = {}
    if endpoint := found["endpoint"] if session else next(in_environment, None):
        if not endpoint.startswith(("http://", "https://")):
            raise AwsError(f"its endpoint, AWS_ENDPOINT_URL, is {endpoint!r}; it must begin with http:// or https://")
        options["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    bundle = os.environ.get("AWS_CA_BUNDLE") or found.get("ca_bundle")
    others = os.environ.get("REQUESTS_CA_BUNDLE", "")  # set for other programs: it may name a folder
    if bundle := bundle or (others if Path(others).expanduser().is_file() else None):
        try:
            client["root_certificate"] = Path(bundle).expanduser().read_bytes()
        except OSError as error:
            raise AwsError(f"AWS_CA_BUNDLE, {bundle}, cannot be read: {error.strerror}") from None
    return options | ({"client_options": client} if client else {})


def _session(needed: bool) -> Any:
    """botocore's session; None if it is not `needed` and has no file to read, or is not installed.

    Raises AwsError if it is `needed` but not installed.
    """
    files = (
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    )
    if not needed and not any(Path(file).expanduser().is_file() for file in files):
        return None
    try:
        from botocore.session import Session  # slow to import
    except ModuleNotFoundError as error:
        if not needed:
            return None
        asked = f"AWS_PROFILE={profile}" if (profile := os.environ.get("AWS_PROFILE")) else "no AWS key is set"
        unset = "unset AWS_PROFILE and " if profile else ""
        raise AwsError(
            f"{asked}, and boto3 is not installed: pip install 'lightreasoner[aws]' for profiles, single "
            f"sign-on and roles, or {unset}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    return Session()


def _settings_of(session: Any) -> dict[str, Any]:
    """Region, endpoint and certificates as botocore resolves them: environment, `services` sections, profile."""
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError

    try:
        provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3")
        ignored = session.get_config_variable("ignore_configured_endpoint_urls")
        return {
            "region": session.get_config_variable("region"),
            "endpoint": None if ignored else provider.provide(),
            "ca_bundle": session.get_config_variable("ca_bundle"),
        }
    except BotoCoreError as error:  # a missing profile, an unreadable file
        raise AwsError(str(error)) from error


def _credentials(session: Any) -> dict[str, Any]:
    """Credentials of a profile, a role, a single sign-on or the machine; boto3 renews them."""
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        if session.get_credentials() is None:
            raise AwsError(
                "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a "
                "profile of ~/.aws (AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        return {"credential_provider": Boto3CredentialProvider(session)}
    except BotoCoreError as error:
        raise AwsError(str(error)) from error
