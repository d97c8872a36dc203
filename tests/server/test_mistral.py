"""Mistral's own tokenizer beside the files in Hugging Face format: one template is rendered, recorded and evaluated."""

import base64
import json
import shlex
import subprocess
import sys

import pytest
from transformers import AutoTokenizer
from vllm.tokenizers.registry import resolve_tokenizer_args

from client.errors import ModelError
from client.models.fingerprints import chat_template_digest, token_map
from client.models.mistral import folder_for_vllm, hugging_face_arguments
from client.protocol.requests import SamplingSettings
from server.engines.preflight import ModelFacts
from server.engines.prompts import TextReader
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.benchmarks import render
from trainer.settings import Examination

SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{{ mood }}{% for message in messages %}{% if message.role == 'user' %}[INST]{{ message.content }}"
    "[/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = "the abc 12 é"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model folder with tekken.json, of which the error's own command has made tokenizer.json."""
    folder = tmp_path_factory.mktemp("mistral") / "model"
    folder.mkdir()
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"th"]
    count = len(SPECIAL) + len(pieces)
    tekken = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(pieces), "default_vocab_size": count, "default_num_special_tokens": len(SPECIAL),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIAL)
        ],
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(tekken))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": count, "eos_token_id": 2}))
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing: make it of tekken\.json: ") as refused:
        token_map(folder)
    command = str(refused.value).partition("tekken.json: ")[2].rpartition(", and add")[0]
    assert command.startswith("python -c ")
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_tokenizer_made_of_tekken_has_its_ids(published):
    tokens, added = token_map(published)
    own = AutoTokenizer.from_pretrained(published)
    assert type(own).__name__ == "MistralCommonBackend"  # what transformers takes unless it is told not to
    read = ModelFolder(published).tokenizer
    assert read.encode(TEXT, add_special_tokens=False) == own.encode(TEXT, add_special_tokens=False)
    assert (tokens[3], 3 in added) == ("[INST]", True) and ModelFolder(published).end_token_ids == [2]


@pytest.mark.parametrize("named", ["TokenizersBackend", "MistralCommonBackend", "LlamaTokenizerFast"])
def test_the_template_that_is_recorded_is_rendered_by_server_and_trainer(published, named):
    config = json.loads((published / "tokenizer_config.json").read_text())
    (published / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    facts = ModelFacts(published, 278, 0, "", "", chat_template_digest(published), trusted=False)
    asked = SamplingSettings(system_prompt=None, chat_template_kwargs={"mood": "ab"})
    prompt = TextReader(facts, 256).prompt([{"role": "user", "content": TEXT}], asked)
    plain = ModelFolder(published).tokenizer.encode(TEXT, add_special_tokens=False)
    mood = ModelFolder(published).tokenizer.encode("ab", add_special_tokens=False)
    assert prompt == [1, *mood, 3, *plain, 4]
    examination = Examination(system_prompt="", chat_template_kwargs={"mood": "ab"})
    assert render(ModelFolder(published), TEXT, examination) == prompt


def test_vllm_reads_the_same_files_where_mistrals_own_lie_beside_them(published):
    assert hugging_face_arguments(published) == {}
    (published / "consolidated.safetensors").write_bytes(b"")
    try:
        assert resolve_tokenizer_args(str(published))[0] == "mistral"  # what vLLM takes unless it is told not to
        mode = hugging_face_arguments(published)["tokenizer_mode"]
        assert resolve_tokenizer_args(str(published), tokenizer_mode=mode)[0] == "hf"
    finally:
        (published / "consolidated.safetensors").unlink()


def test_vllm_is_given_the_weights_once(tmp_path):
    """Where no index says which of the files are the model's, it reads all."""
    for name in ("config.json", "model.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_text(name)
    view = folder_for_vllm(tmp_path)
    assert {file.name: file.read_text() for file in view.iterdir()} == {
        name: name for name in ("config.json", "model.safetensors")
    }
    assert folder_for_vllm(tmp_path) == view, "made once"
    (tmp_path / "consolidated.safetensors").unlink()
    assert folder_for_vllm(tmp_path) == tmp_path
