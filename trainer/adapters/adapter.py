"""The adapter folder: a LoRA adapter in PEFT format, and lightreasoner.json, which says where it came from.

In: a path. Out: a new folder, the adapter's settings, a check that it fits a model. Never loads weights.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from client.errors import ModelError, shown
from client.storage.bucket import Bucket, local_folder
from trainer.adapters.model_folder import ModelFolder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "lightreasoner.json"
KINDS = "LORA", "ADALORA"
"""PEFT types whose update is a product of matrices. `evaluate` accepts only the first."""
TRUTH = (bool,), "true or false"
SHAPES: dict[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "target_modules": ((str, list, type(None)), "a list of names"),
    "rank_pattern": ((dict,), "an object"),
    "alpha_pattern": ((dict,), "an object"),
    "use_rslora": TRUTH,
    "use_dora": TRUTH,
    "fan_in_fan_out": TRUTH,
    "lora_bias": TRUTH,
}
"""Fields of adapter_config.json that PEFT and vLLM use without a check: the types of each, and the same in words."""
WHOLE_FILE = "whole.json"
"""File that completes a checkpoint: lists its files with their digests, and is written last."""
LANDMARKS = {
    "run.json": "a RUN", CONFIG: "an adapter", "metrics.jsonl": "a training", "config.json": "a model",
    "unfinished/config.json": "what a killed merge left",
}  # fmt: skip
"""Files that tell what a folder holds, and its content in words."""


def is_local(url: str) -> bool:
    """Whether a path or URL is on this machine."""
    return "://" not in url or url.startswith("file:")


def free_folder(out: str) -> Path:
    """The path of a local folder that is empty or can be created. Does not create it. Raises ModelError otherwise."""
    if not is_local(out):
        raise ModelError(
            f"{out!r} is not a local folder; give a local path or file://…, and copy the result from there"
        )
    check_writable(folder := local_folder(out))
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty: it holds {what_lies(folder)}; empty it, or give another OUT")
    return folder


def what_lies(place: Path | Bucket) -> str:
    """The content of a folder, or of a bucket's prefix, in words."""
    for name, kind in LANDMARKS.items():
        # Path.is_file raises where a name is too long.
        if os.path.isfile(place / name) if isinstance(place, Path) else place.get(name) is not None:  # noqa: PTH113
            return kind
    return "other files"


def check_writable(folder: Path) -> None:
    """Raises ModelError if a folder, or its nearest parent that exists, cannot be written to."""
    try:
        there = next(above for above in (folder, *folder.parents) if _is_there(above))
    except OSError as error:
        raise _not_created(folder, error.strerror) from None
    if not os.path.isdir(there):  # noqa: PTH112 - Path.is_dir raises where a link leads to what nobody may see
        raise _not_created(folder, f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_created(folder, f"{there} cannot be written to")


def make_folder(folder: Path) -> None:
    """Create a folder. Raises ModelError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_created(folder, error.strerror) from None


def _is_there(path: Path) -> bool:
    """Whether a path exists. A broken link counts."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _not_created(folder: Path, why: str | None) -> ModelError:
    return ModelError(f"cannot create the folder {folder}: {why}; name another")


def adapter_folder(adapter: str) -> Path:
    """The local folder of an adapter. An adapter in a bucket is downloaded to a folder that is removed at exit.

    Raises ModelError if the bucket holds no adapter there.
    """
    if is_local(adapter):
        return local_folder(adapter) if adapter.startswith("file:") else Path(adapter)
    bucket, folder = Bucket(adapter), Path(tempfile.mkdtemp(prefix="lightreasoner-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in (CONFIG, WEIGHTS, PROVENANCE):
        if (data := bucket.get(name)) is not None:
            (folder / name).write_bytes(data)
    if not (folder / WEIGHTS).is_file():
        for name in bucket.first_names():  # the error names weights in another form: empty files will do
            if name.startswith("adapter_model") and not name.endswith("/"):
                (folder / name).touch()
    if not (folder / CONFIG).is_file():
        raise _missing_adapter(adapter, bucket.names("checkpoints"))
    return folder


def read_config(adapter: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises ModelError if it is missing, invalid or not of a LoRA adapter, or if the weights are missing.
    """
    try:
        config = json.loads((adapter / CONFIG).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _missing_adapter(str(adapter), adapter.glob("checkpoints/*/*")) from None
    except OSError as error:
        raise ModelError(f"no adapter at {adapter}: {CONFIG} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{adapter / CONFIG} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{adapter / CONFIG} is not a JSON object; train the adapter again")
    _check_kind(adapter, config)
    if not (adapter / WEIGHTS).is_file():
        raise _missing_weights(adapter)
    return config


def _check_kind(adapter: Path, config: dict[str, Any]) -> None:
    """Raises ModelError unless `config` is of a LoRA adapter, and its fields have the types in `SHAPES`."""
    kind = config.get("peft_type")
    if kind is None or (isinstance(kind, str) and kind not in KINDS and kind.upper() in KINDS):
        raise ModelError(
            f"{adapter / CONFIG} has the peft_type {shown(kind)}: PEFT needs it to read the adapter; if it is a LoRA"
            ' adapter, put "peft_type": "LORA" there'
        )
    if kind not in KINDS:
        raise ModelError(
            f"{adapter} is no LoRA adapter: its {CONFIG} has the peft_type {shown(kind)}, and LORA is needed; train a"
            " LoRA adapter, or merge this one with PEFT (merge_and_unload), if its type can be merged"
        )
    for name, (types, what) in SHAPES.items():
        value = config.get(name)
        if name not in config or (name == "rank_pattern" and value is None and kind == "ADALORA"):
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            remedy = "remove the line" if value is None else "correct it there"
            raise ModelError(f"{adapter / CONFIG} is damaged: {name} is {shown(value)}, not {what}; {remedy}")


def _missing_weights(adapter: Path) -> ModelError:
    """The error for an adapter folder that has settings but no weights, or weights in another form."""
    if (adapter / WHOLE_FILE).is_file():
        return ModelError(f"{adapter} has no {WEIGHTS}: continue its training with --resume to get a whole adapter")
    if (adapter / WEIGHTS).is_symlink():
        return ModelError(f"{adapter / WEIGHTS} is a link that leads nowhere; copy or download the adapter again")
    others = sorted(file.name for file in adapter.glob("adapter_model*") if file.suffix in (".bin", ".safetensors"))
    if not others:
        return ModelError(f"{adapter} has no {WEIGHTS}: train the adapter again")
    if others[0].endswith(".bin"):
        remedy = "load the adapter with PEFT (PeftModel.from_pretrained), and save it again with save_pretrained"
    else:
        remedy = f"PEFT reads no parts; put their tensors into one {WEIGHTS} with safetensors (load_file, save_file)"
    return ModelError(f"{adapter} has no {WEIGHTS}, but {others[0]}: {remedy}")


def _missing_adapter(adapter: str, checkpoints: Iterable[str | Path]) -> ModelError:
    """The error for a missing adapter. `checkpoints`: the files of checkpoints there; the error names the last."""
    names = (file.parent.name.rpartition("-")[2] for file in map(PurePath, checkpoints) if file.name == WHOLE_FILE)
    if steps := [int(name) for name in names if name.isdecimal()]:
        return ModelError(
            f"no adapter at {adapter}: its training has not ended; repeat its command with --resume, or give a "
            f"checkpoint, as {adapter}/checkpoints/checkpoint-{max(steps)}"
        )
    return ModelError(f"no adapter at {adapter}: it has no {CONFIG}; 'lightreasoner-trainer train' makes one")


def package_versions() -> dict[str, str]:
    """The versions of the packages that a result may depend on."""
    return {name: version(name) for name in ("lightreasoner", "torch", "transformers", "peft", "accelerate")}


def check_base(adapter: Path, base: ModelFolder) -> None:
    """Raises ModelError if an adapter was trained on other weights than those of `base`.

    An adapter from another program does not record its base, and passes.
    """
    file = adapter / PROVENANCE
    try:
        made_for = json.loads(file.read_bytes())["base_model_fingerprint"] if file.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error!r}); move it away to use the adapter unchecked") from None
    if made_for not in (None, base.fingerprint):
        named = read_config(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{adapter} was made for other weights ({made_for[:12]}) than those at {base} ({base.fingerprint[:12]}); "
            f"give the model that it was trained on: {named}"
        )
