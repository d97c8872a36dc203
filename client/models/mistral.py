"""Handles Mistral's own files beside those in Hugging Face format: the service reads only the latter.

In: a model folder. Out: engine arguments, a folder for vLLM, or how to make a missing tokenizer.json.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

TEKKEN = "tekken.json"
"""Mistral's own tokenizer. It has no chat template, so transformers and vLLM render different prompts if they use
it."""


def hugging_face_arguments(folder: Path) -> dict[str, str]:
    """Engine arguments with which vLLM reads the files in Hugging Face format, if Mistral's own are there too."""
    if not any(folder.glob("consolidated*.safetensors")):
        return {}
    return {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf"}


def folder_for_vllm(folder: Path) -> Path:
    """The folder that vLLM reads: the model's, or one with links to its files, which lives as long as this process.

    Without an index vLLM reads every *.safetensors, including Mistral's own copy of the weights, and fails.
    """
    twice = (folder / "model.safetensors").is_file() and any(folder.glob("consolidated*.safetensors"))
    return Path(_without_copy(folder.absolute()).name) if twice else folder


@cache
def _without_copy(folder: Path) -> TemporaryDirectory[str]:
    """A folder with links to all files of a model, except Mistral's own copy of the weights."""
    made = TemporaryDirectory(prefix=f"{folder.name}-")
    for file in folder.iterdir():
        if not file.match("consolidated*.safetensors"):
            (Path(made.name) / file.name).symlink_to(file)
    return made


def tokenizer_remedy(folder: Path) -> str:
    """How to make the tokenizer.json that a folder lacks."""
    if not (folder / TEKKEN).is_file():
        return "save the tokenizer with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    made = "mistral_format=False, bos_token='<s>', eos_token='</s>'"
    return (
        f'make it of {TEKKEN}: python -c "from transformers import AutoTokenizer as A;'
        f" A.from_pretrained('{folder}', {made}).save_pretrained('{folder}')\", and add the model's chat_template.jinja"
    )
