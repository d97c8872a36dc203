"""Reads settings: a flag wins over an environment variable, which wins over server.yaml.

In: the path of server.yaml, `LIGHTREASONER_…` variables, flags. Out: `ServerSettings`. An error names the flag, the
variable, or the file and key that holds the invalid value. It starts nothing and imports neither torch nor vLLM.

A variable's name is the key in capitals, with a double underscore between nested keys: LIGHTREASONER_PORT,
LIGHTREASONER_LIMITS__BODY_BYTES, LIGHTREASONER_EXPERT__MAX_MODEL_LEN. An engine argument is parsed as JSON or YAML, as
in the file; a model's name is not parsed. An empty variable counts as not set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from client.errors import did_you_mean, fault_words
from server.logs import log
from server.settings import (
    API_KEYS_VARIABLE,
    NESTED,
    PREFIX,
    RESERVED,
    RESERVED_AMATEUR,
    ROLES,
    ServerLimits,
    ServerSettings,
    SettingsError,
    refuse_changes,
)
from server.watchdog import MARK

OTHER_VARIABLES = frozenset({API_KEYS_VARIABLE, f"{PREFIX}API_KEY", MARK})
"""Variables with our prefix that are not settings: the server's keys, the client's key, the watchdog's mark."""


class EnvironmentSettings(EnvSettingsSource):
    """Settings from the environment. Unlike its base, it parses engine arguments, and its errors name the variable."""

    def explode_env_vars(self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]) -> dict[str, Any]:
        nested = super().explode_env_vars(field_name, field, env_vars)
        if field_name in ROLES:
            return {key: text if key == "model" else _parsed(text, field_name, key) for key, text in nested.items()}
        return nested

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> Any:
        return _parsed(value, field_name)


def load_settings(config: Path | None, **flags: Any) -> ServerSettings:
    """Settings from a file, the environment and flags; `expert` and `amateur` among the flags may be model names.

    Raises SettingsError naming the place of the invalid value.
    """
    _warn_of_unknown_variables()
    flags = {
        key: {"model": value} if key in ROLES and not isinstance(value, dict) else value
        for key, value in flags.items()
        if value is not None
    }
    sources = [flags, _from_environment(), _read(config) if config else {}]

    def place_of(*keys: str) -> str:
        """The place of a key's value, for an error: flag, variable, or file and key."""
        flag, variable, file = (_holds(source, keys) for source in sources)
        if flag:
            return f"--{keys[0].replace('_', '-')}"
        if variable:
            names = {name.upper() for name in os.environ}
            return next(name for name in _variables_of(keys) if name in names)
        return f"{config}: {'.'.join(keys)}" if file else ".".join(keys)

    for role in ROLES:
        for source in sources:
            if not isinstance(source.get(role) or {}, dict):
                alone = f"for the model alone, set {role}.model or {PREFIX}{role.upper()}__MODEL"
                raise SettingsError(f"{place_of(role)} must be a mapping of vLLM engine arguments; {alone}")
    values: dict[str, Any] = {}
    for source in reversed(sources):
        values = _merged(values, source)
    for role in ROLES:
        section = values.get(role) or {}
        if not section.get("model"):
            ways = f"give --{role} MODEL, or set {role}.model in --config FILE or {PREFIX}{role.upper()}__MODEL"
            like = [f"; {role}.{key} is set{meant}" for key in section if (meant := did_you_mean(key, ["model"]))]
            raise SettingsError(f"no {role} model: {ways}{''.join(like[:1])}")
        values[role] = section | {"model": str(section["model"])}
        refuse_changes(role, section, RESERVED | (RESERVED_AMATEUR if role == "amateur" else {}), place_of)
    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        unknown = first["type"] == "extra_forbidden"
        raise SettingsError(f"{place_of(*keys)}: {_unknown(keys) if unknown else fault_words(first)}") from None


def _from_environment() -> dict[str, Any]:
    found = EnvironmentSettings(ServerSettings)()
    if str(found.get("port")).startswith("tcp://"):
        del found["port"]  # Kubernetes sets such a value in every pod if a Service is called lightreasoner
    return found


def _parsed(value: Any, *keys: str) -> Any:
    """Parse a variable's value as in server.yaml. Nested variables are a mapping already."""
    if isinstance(value, dict):
        return {key: _parsed(inner, *keys, key) for key, inner in value.items()}
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise SettingsError(f"{_variables_of(keys)[0]}: neither JSON nor YAML: {said}") from None


def _variables_of(keys: tuple[str, ...]) -> list[str]:
    """Variables that may hold a key's value: its own, then those of the mappings around it."""
    return [PREFIX + NESTED.join(keys[:depth]).upper() for depth in range(len(keys), 0, -1)]


def _holds(source: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if not isinstance(source, dict) or key not in source:
            return False
        source = source[key]
    return True


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `over`, which win; mappings are merged key by key."""
    both = {key: value for key, value in over.items() if isinstance(value, dict) and isinstance(values.get(key), dict)}
    return values | over | {key: _merged(values[key], value) for key, value in both.items()}


def _unknown(keys: list[str]) -> str:
    known = ServerLimits.model_fields if keys[0] == "limits" and len(keys) > 1 else ServerSettings.model_fields
    return "unknown setting" + did_you_mean(keys[-1], known)


def _warn_of_unknown_variables() -> None:
    """Warn of variables that look like misspelled settings.

    This is not an error: other programs and Kubernetes may set variables with our prefix.
    """
    for name in sorted(os.environ):
        first = name.removeprefix(PREFIX).partition(NESTED)[0].lower()
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES or first in ServerSettings.model_fields:
            continue
        if meant := did_you_mean(first.upper(), map(str.upper, ServerSettings.model_fields), PREFIX):
            log.warning("%s is not a setting, ignored%s", name, meant)


def _read(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text())
    except OSError as error:
        raise SettingsError(f"--config {config} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"--config {config} is not valid YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise SettingsError(f"--config {config} must be a mapping with sections 'expert:' and 'amateur:'")
    return values or {}
