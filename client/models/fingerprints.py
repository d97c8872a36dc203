"""Identifies a model by its files: fingerprints of weights, tokenizer and chat template.

In: a model folder in Hugging Face format. Out: hex digests and the token map. Never loads weights: it reads the header
and the first 4 KiB of each tensor, so a 7B model takes well under a second.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from client.errors import ModelError, reason_of, shown
from client.models.mistral import tokenizer_remedy
from client.protocol.requests import LARGEST_ID

HEAD_BYTES = 4096
"""Bytes of each tensor that enter the model fingerprint."""
ONE_FILE, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-((\d{5})\.safetensors)")


def model_folder(
    model: str, *, revision: str | None = None, cache: str | None = None, token: str | bool | None = None,
    code: bool = False,
) -> Path:  # fmt: skip
    """The local folder of a model. `model`: a folder, or a Hugging Face Hub id, which is downloaded if needed.

    For a Hub id, `revision` names a branch, tag or commit, `cache` is the folder for downloads, `token` grants access,
    and `code` downloads the model's own Python files too. Raises ModelError if `model` is neither, or holds an adapter.
    """
    folder = Path(model)
    if folder.is_dir():
        return _no_adapter(folder)
    if folder.is_file():
        raise ModelError(f"{model} is a file, and a model is a folder in Hugging Face format: give the folder")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"no model folder at {model!r}: give a folder in Hugging Face format or a Hub id 'owner/name'")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", *(["*.py"] if code else [])]
        folder = Path(
            snapshot_download(model, revision=revision, cache_dir=cache, token=token, allow_patterns=patterns)
        )
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"model {model!r}{at} not found: no such folder, and the download from the Hugging Face Hub failed:"
            f" {reason_of(error)}"
        ) from error
    return _no_adapter(folder)


def _no_adapter(folder: Path) -> Path:
    """Return the folder. Raises ModelError if it holds an adapter: transformers would load the adapter's base."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return folder
    if any(not weights.name.startswith("adapter") for weights in folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds a model and a LoRA adapter ({file.name}); move the adapter to another folder")
    base = _json_object(file).get("base_model_name_or_path") or "MODEL"
    raise ModelError(
        f"{folder} holds a LoRA adapter, not a model; merge it and name the merged folder: lightreasoner-trainer merge"
        f" {base} {folder} OUT"
    )


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over every safetensors tensor's name, dtype, shape and first 4 KiB, in order of name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no *.safetensors in {folder}: save the model with save_pretrained(…) in safetensors format")
    for name in sorted(shard_names(folder)):
        if not (folder / name).is_file():
            told = f"which {SHARD_INDEX} lists" if (folder / SHARD_INDEX).is_file() else "by the names of the others"
            raise ModelError(f"{folder / name} is missing, {told}; download the model again")
    tensors: dict[str, bytes] = {}
    for file in files:
        with file.open("rb") as stream:
            try:
                header_size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(header_size))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    begin, end = entry["data_offsets"]
                    if 8 + header_size + end > file.stat().st_size:
                        raise ValueError(f"{name} is cut off")
                    stream.seek(8 + header_size + begin)
                    identity = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
                    tensors[name] = identity + b"\0" + stream.read(min(HEAD_BYTES, end - begin))
            except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
                raise ModelError(f"{file} is not a readable safetensors file; copy it again") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def shard_names(folder: Path) -> set[str]:
    """The names of the weights' shards, from the index, or else from the numbers in the files' names.

    Empty if the weights are in one file, or in Mistral's own files, whose names begin with `consolidated`.
    """
    index = folder / SHARD_INDEX
    if not index.is_file():
        if (folder / ONE_FILE).is_file():
            return set()
        files = (file.name for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
        shards = [found for name in files if (found := SHARD.fullmatch(name))]
        return {f"{one[1]}-{number:05}-of-{one[2]}" for one in shards for number in range(1, int(one[3]) + 1)}
    try:
        return set(_json_object(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} lists no weights ({error!r}); download the model again") from error


def token_map(folder: Path) -> tuple[dict[int, str], set[int]]:
    """The tokens of tokenizer.json by id, and the ids of the added tokens."""
    remedy = tokenizer_remedy(folder)
    tokenizer = _json_object(folder / "tokenizer.json", remedy)
    try:
        listed = tokenizer["model"]["vocab"]
        pairs = listed.items() if isinstance(listed, dict) else ((row[0], index) for index, row in enumerate(listed))
        tokens = {int(index): str(token) for token, index in pairs}
        added = {int(entry["id"]): str(entry["content"]) for entry in tokenizer.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{folder}/tokenizer.json has no vocabulary that can be read ({error!r}): {remedy}") from error
    return tokens | added, set(added)


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 of the sorted (id, token) pairs."""
    tokens, _ = token_map(folder)
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()


def chat_template(folder: Path) -> str | None:
    """The default chat template of a model folder, from the first file that has one; None if there is none."""
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        if (file := folder / name).is_file():
            return template_in(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _json_object(folder / name).get("chat_template") if (folder / name).is_file() else None
        try:
            if isinstance(template, list):
                template = {entry["name"]: entry["template"] for entry in template}
            if isinstance(template, dict):
                template = template.get("default")
            if template:
                return "" + template
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{folder / name}: chat_template is neither a text nor texts with their names ({error!r}); add"
                " chat_template.jinja to the folder"
            ) from error
    return None


def template_in(file: Path) -> str:
    """A Jinja file's text. Raises ModelError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"chat template {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 ({error})") from None


def chat_template_digest(folder: Path, file: Path | None = None) -> str | None:
    """SHA-256 of the default chat template, or of the one in `file`; None if there is none."""
    template = template_in(file) if file else chat_template(folder)
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def check_generation_config(folder: Path) -> None:
    """Raise ModelError if generation_config.json is invalid. vLLM and transformers would ignore its end tokens."""
    file = folder / "generation_config.json"
    ends = _json_object(file, "download it again").get("eos_token_id") if file.is_file() else None
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not (isinstance(end, int) and -1 <= end <= LARGEST_ID):
            raise ModelError(f"{file} has eos_token_id {shown(ends)}, where token ids were expected; correct it")


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError if it is invalid, or describes an encoder-decoder."""
    config = _json_object(folder / "config.json", "is this a model folder in Hugging Face format?")
    if config.get("is_encoder_decoder"):
        named = shown(config.get("architectures"))
        raise ModelError(
            f"{folder}/config.json describes an encoder-decoder ({named}); a causal language model is needed"
        )
    return config


def _json_object(file: Path, remedy: str = "") -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: {remedy}") from None
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object: {remedy}")
    return content
