"""The adapter folder: a LoRA adapter in PEFT format, and lightreasoner.json, which says where it came from.

In: a path. Out: whether it is free, what it was made from, whether it fits a base. Loads no weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from client.errors import ModelError
from client.fingerprints import model_fingerprint
from client.run import Run

CONFIG = "adapter_config.json"
PROVENANCE = "lightreasoner.json"


def adapter_output(out: str) -> Path:
    """The folder for a new adapter. Raises ModelError where it holds one already, or is not local."""
    folder = _local(out)
    if (folder / CONFIG).is_file():
        raise ModelError(f"{folder} already holds an adapter; name a new folder or remove this one")
    return folder


def model_output(out: str) -> Path:
    """The folder for a merged model. Raises ModelError where it is not empty, or is not local."""
    folder = _local(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty; name a new folder or remove this one")
    return folder


def read_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError where there is none."""
    try:
        return json.loads((adapter / CONFIG).read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"no adapter at {adapter}: it has no {CONFIG}; 'lightreasoner-trainer train' makes one"
        ) from None
    except ValueError as error:
        raise ModelError(f"{adapter / CONFIG} is not valid JSON ({error})") from error


def write_provenance(adapter: Path, base: Path, run: Run) -> None:
    """Record the base's fingerprint and the RUN's identity beside the weights."""
    provenance = {
        "base_model_fingerprint": model_fingerprint(base),
        "run": str(run),
        "run_identity": run.manifest().identity(),
    }
    (adapter / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def check_base(adapter: Path, base: Path) -> None:
    """Raises ModelError where an adapter says that it was made for other weights than those in `base`.

    An adapter that was not made here says nothing of the kind and is let through.
    """
    file = adapter / PROVENANCE
    made_for = json.loads(file.read_bytes())["base_model_fingerprint"] if file.is_file() else None
    found = model_fingerprint(base)
    if made_for not in (None, found):
        named = read_config(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{adapter} was made for other weights ({made_for[:12]}) than those at {base} ({found[:12]}); "
            f"give the model that it was trained on: {named}"
        )


def _local(out: str) -> Path:
    url = urlsplit(out)
    if url.scheme not in ("", "file"):
        raise ModelError(f"{out!r} is not a local folder; name a local path or file://…, and copy it from there")
    folder = Path(unquote(url.path)) if url.scheme else Path(out)
    if folder.is_file():
        raise ModelError(f"{folder} is a file; name a new folder")
    return folder
