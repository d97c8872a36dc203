"""Variants of a RUN that an ablation trains: each has a name and settings of the contrast that replace the RUN's.

In: the value of --variants: `labels=tilt gamma=0.5, select=top keep=0.05`, or the name of a file with one variant a
line. Out: variants, or an error that names the invalid one. Builds nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from client.errors import LightReasonerError, fault_words
from client.protocol.requests import ContrastSettings


@dataclass(frozen=True)
class Variant:
    """One way of selecting and labelling: settings by their names in run.json."""

    name: str
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name, spelled so that a folder can have it."""
        return re.sub(r"[^\w.=-]+", "-", self.name, flags=re.ASCII).strip("-")

    def of(self, run: ContrastSettings) -> ContrastSettings:
        """The RUN's settings, changed by the variant's. Raises LightReasonerError, naming the variant, if invalid."""
        try:
            return ContrastSettings(**run.changed(**self.settings))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {fault_words(first)}" if where else fault_words(first)
            said = re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda field: _written_name(field[0]), said)
            raise LightReasonerError(f"--variants: {self.name}: {said}") from None


PAPER_VARIANTS = (
    Variant("full", {"select": "kl", "labels": "contrast"}),
    Variant("without step selection", {"select": "random", "labels": "contrast"}),
    Variant("without contrast", {"select": "kl", "labels": "expert"}),
    Variant("without either", {"select": "random", "labels": "expert"}),
)
"""Without step selection, as many steps are drawn at random. Without contrast, labels are the expert's probabilities.
"""


def variants_of(text: str | None) -> Sequence[Variant]:
    """The variants that --variants names: a comma-separated list, or a file with a variant a line and comments after #.

    A variant is `NAME: SETTING=VALUE …`, the settings alone, or only the name of one of the paper's. None: the paper's
    four. Raises LightReasonerError if the text is invalid.
    """
    if text is None:
        return PAPER_VARIANTS
    # Path.is_file raises where a list is too long for a file's name.
    is_file = os.path.isfile(text)  # noqa: PTH113
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise LightReasonerError(f"--variants {text} cannot be read: {error}") from None
    written = [line.partition("#")[0].strip() for line in lines]
    variants = [_variant(line) for line in written if line]
    if not variants:
        raise LightReasonerError(f"--variants {text!r} names no variant; as labels=tilt gamma=0.5, labels=expert")
    folders = [variant.folder for variant in variants]
    if twice := next((one.name for one in variants if folders.count(one.folder) > 1), None):
        raise LightReasonerError(f"--variants: {twice!r} is given twice; give each another name, as NAME: SETTINGS")
    return variants


def _written_name(field: str) -> str:
    """The name of a setting in --variants, from its name in run.json."""
    return "seed" if field == "select_seed" else field.replace("_", "-")


def _setting_value(text: str) -> Any:
    """The value of a setting: a number, true or false; any other text stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_infinite(text: str) -> bool:
    """Whether the text means infinity, so no bound, in any spelling that `build --max-shift` accepts."""
    try:
        return float(text) == math.inf
    except ValueError:
        return False


def _variant(written: str) -> Variant:
    if known := next((variant for variant in PAPER_VARIANTS if variant.name == written), None):
        return known
    name, colon, rest = written.partition(":")
    words = (rest if colon else written).split()
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        field = "select_seed" if key == "seed" else key.replace("-", "_")
        if not equals or field not in ContrastSettings.model_fields or field in settings:
            known_settings = ", ".join(map(_written_name, ContrastSettings.model_fields))
            named = ", ".join(variant.name for variant in PAPER_VARIANTS)
            raise LightReasonerError(
                f"--variants: {word!r} in {written!r} is not SETTING=VALUE, each setting once; the settings are "
                f"{known_settings}, and {named} are variants by name"
            )
        settings[field] = _setting_value(value)
        if field == "max_shift" and _is_infinite(value):
            settings[field] = None
    label = " ".join(name.split()) if colon else " ".join(words)
    if not label or not Variant(label, {}).folder:
        raise LightReasonerError(f"--variants: {written!r} has no name before its colon")
    return Variant(label, settings)
