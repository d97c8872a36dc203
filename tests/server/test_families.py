"""Families of models: a tiny pair of each, through real engines in float32, held to transformers' plain computation.

`python -m pytest tests/server/test_families.py -m 'long or not long' -rP` prints the largest differences of all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.models.families import COLUMNS, FAMILIES, ORDINARY, Family, save_family
from support.models.oracle import Oracle
from support.servers.real_server import RunningServer, running_server
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from client.protocol.requests import Problem, SamplingSettings, Trajectory, parse_line
from server.engines.preflight import ModelFacts, inspect_pair
from server.engines.prompts import Prompts, TextReader, TrajectoryError
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.benchmarks import render
from trainer.settings import Examination

TOLERANCE, HALF_TOLERANCE = 2e-4, 0.1
DAY, WRITTEN = "2026-01-31", {"%d %b %Y": "31 Jan 2026", "%Y-%m-%d": "2026-01-31"}
QUESTIONS = [f"Ann has {n} apples. How many apples does Ann have now?" for n in range(2, 6)]


@dataclass(frozen=True)
class Case:
    """A pair, and how it lies on the disk."""

    expert: Family
    amateur: Family
    dtype: str = "float32"
    arrange: Callable[[Path], dict[str, Any]] = lambda folder: {}  # changes the expert's folder; gives settings
    expert_saved: dict[str, Any] | None = None  # arguments of save_family
    amateur_saved: dict[str, Any] | None = None


def same(name: str, **how: Any) -> Case:
    return Case(FAMILIES[name], FAMILIES[name], **how)


def beside_mistrals_own(folder: Path) -> dict[str, Any]:
    """As Mistral publishes: the same weights once more, under other names."""
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    return {}


def behind_links(folder: Path) -> dict[str, Any]:
    """As the Hub's cache has it: a folder of links, behind a link."""
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    linked = folder.with_name("snapshot")
    linked.mkdir()
    for file in blobs.iterdir():
        (linked / file.name).symlink_to(Path("..") / "blobs" / file.name)
    folder.symlink_to(linked)
    return {}


def template_apart(folder: Path) -> dict[str, Any]:
    """A base model without a template, and the file that --chat-template names."""
    return {"chat_template": str((folder / "chat_template.jinja").rename(folder.with_name("template.jinja")))}


R1, QWEN = FAMILIES["DeepSeek-R1-Distill-Qwen"], FAMILIES["Qwen2.5"]
CASES = {name: same(name) for name in FAMILIES if "base" not in name} | {
    "Mistral": same("Mistral", arrange=beside_mistrals_own),
    "DeepSeek-R1-Distill-Qwen with Qwen2.5": Case(R1, QWEN, amateur_saved={"vocab_size": 120}),
    "Qwen2.5-Math, base with Qwen2.5, base": Case(
        FAMILIES["Qwen2.5-Math, base"], FAMILIES["Qwen2.5, base"], amateur_saved={"vocab_size": 120}
    ),
    "Qwen2.5, no template of its own": same("Qwen2.5", arrange=template_apart),
    "Llama 3, in shards behind links": same("Llama 3", arrange=behind_links, expert_saved={"shard": "40KB"}),
    "Qwen2.5, tied, saved in float16": same("Qwen2.5", expert_saved={"dtype": torch.float16}),
    "Qwen2.5, tied, computed in float16": same("Qwen2.5", dtype="float16", expert_saved={"dtype": torch.float16}),
}
AT_EVERY_CHANGE = ("Gemma 2",)


def served(case: Case, folder: Path) -> AbstractContextManager[RunningServer]:
    """A server of the case's pair, whose models are made in `folder`."""
    for role, saved in (("expert", case.expert_saved), ("amateur", case.amateur_saved)):
        save_family(folder / role, getattr(case, role), role, **(saved or {}))
    settings = case.arrange(folder / "expert")
    return running_server(
        folder / "expert", folder / "amateur", folder, case.dtype, cache_bytes=2**26, imported=True, **settings
    )


def rendered(folder: Path, family: Family, question: str) -> list[int]:
    """A question's prompt, by transformers."""
    system = [{"role": "system", "content": family.system_prompt}] if family.system_prompt else []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": question}], chat_template=family.template, add_generation_prompt=True,
        return_dict=False, strftime_now=WRITTEN.__getitem__, **family.variables,
    )  # fmt: skip


def known_ids(case: Case, columns: int) -> np.ndarray:
    """Which ids the amateur knows, whose head has so many columns: [the expert's columns]."""
    mine, theirs = (dict(enumerate(family.tokens, ORDINARY)) for family in (case.expert, case.amateur))
    return np.array([index < columns and mine.get(index) == theirs.get(index) for index in range(COLUMNS)])


def difference(rows: np.ndarray, exact: np.ndarray, ids: np.ndarray, known: np.ndarray) -> float:
    """The largest one between rows [t, k] and the exact [t, V] at the same ids, of those that are known."""
    exact = np.take_along_axis(exact, np.where(known[ids], ids, 0), 1)
    return float(np.abs(rows - exact)[known[ids]].max())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in AT_EVERY_CHANGE else pytest.mark.long) for name in CASES]
)
def test_a_familys_pair_agrees_with_transformers(name, tmp_path):
    case, own = CASES[name], CASES[name].expert != CASES[name].amateur and CASES[name].expert == R1
    if case.expert.kind == "gemma3" and not find_spec("torchvision"):  # vLLM's class reads images with it
        with (
            pytest.raises(AssertionError, match=r"engine did not start .*No module named 'torchvision'"),
            served(case, tmp_path),
        ):
            pass
        return
    asked = {
        "problems": [{"id": question, "question": question} for question in QUESTIONS], "max_tokens": 24, "top_k": 20,
        "system_prompt": case.expert.system_prompt, "date": DAY, "chat_template_kwargs": dict(case.expert.variables),
        "encoding": "base64",
    }  # fmt: skip
    with served(case, tmp_path) as server:
        cards = {card["role"]: card for card in server.ask("GET", "/v1/models").json()["data"]}
        answer = server.ask("POST", "/v1/trajectories", json=asked).text
    lines = [line for line in map(parse_line, answer.splitlines()) if isinstance(line, Trajectory)]
    assert sorted(line.problem_id for line in lines) == QUESTIONS, answer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "expert")
    ends = sorted(map(tokenizer.convert_tokens_to_ids, case.expert.end_tokens))
    assert cards["expert"]["end_token_ids"] == ends
    assert cards["amateur"]["amateur_prompt"] == ("own" if own else "same")
    expert, amateur = (Oracle(tmp_path / role, attention="eager") for role in ("expert", "amateur"))
    found, known = {"expert": 0.0, "amateur": 0.0}, known_ids(case, amateur.columns)
    for line in lines:
        prompt, ids = line.prompt_token_ids.tolist(), line.top_ids
        assert prompt == rendered(tmp_path / "expert", case.expert, line.problem_id)
        begins = [tokenizer.bos_token_id] * ("bos_token" in case.expert.template)  # Phi-3's and GPT-OSS's write none
        assert [index for index in prompt if index == tokenizer.bos_token_id] == begins == prompt[: len(begins)]
        exact = expert.logprobs(line.prompt_token_ids, line.token_ids)
        found["expert"] = max(found["expert"], difference(line.expert_logprobs, exact, ids, np.ones(COLUMNS, bool)))
        read = rendered(tmp_path / "amateur", case.amateur, line.problem_id) if own else prompt
        assert (np.isneginf(line.amateur_logprobs) == ~known[ids]).all()
        until = 1 + int(np.argmin([*known[line.token_ids[:-1]], False]))  # a token that it does not know is left out
        exact = amateur.logprobs(np.array(read), np.where(known[line.token_ids], line.token_ids, 0))[:until]
        found["amateur"] = max(found["amateur"], difference(line.amateur_logprobs[:until], exact, ids[:until], known))
    print(f"| {name} | {found['expert']:.1e} | {found['amateur']:.1e} |")
    assert max(found.values()) <= (TOLERANCE if case.dtype == "float32" else HALF_TOLERANCE), found


def test_an_expert_without_a_template_takes_token_ids_and_says_so_of_questions(tmp_path):
    for role in ("expert", "amateur"):
        save_family(tmp_path / role, QWEN, role)
    (tmp_path / "expert" / "chat_template.jinja").unlink()
    facts = inspect_pair(tmp_path / "expert", tmp_path / "amateur")
    prompts = Prompts(facts, {"expert": 256, "amateur": 256}, {"eos_token_id": 112})
    ids = asyncio.run(prompts.render(Problem(id="1", prompt_token_ids=[6, 7]), SamplingSettings()))
    assert ids.expert == [6, 7] and prompts.end_tokens == [112]
    with pytest.raises(TrajectoryError, match=r"the expert has no chat template.*--chat-template FILE"):
        asyncio.run(prompts.render(Problem(id="1", question="How many?"), SamplingSettings()))


def test_a_switch_that_makes_the_prompt_strange_to_the_amateur_gives_it_its_own_and_is_named(tmp_path):
    """Qwen3 without thinking writes <think>, which Qwen2.5 does not know; with thinking it does not."""
    for role, family in (("expert", FAMILIES["Qwen3"]), ("amateur", QWEN)):
        save_family(tmp_path / role, family, role)
    facts = inspect_pair(tmp_path / "expert", tmp_path / "amateur")
    prompts = Prompts(facts, {"expert": 256, "amateur": 256}, {})
    assert (prompts.amateur_prompt, prompts.own_with) == ("same", {"enable_thinking": [False]})
    for thinking in (True, False):
        asked = SamplingSettings(chat_template_kwargs={"enable_thinking": thinking})
        read = asyncio.run(prompts.render(Problem(id="1", question="How many?"), asked))
        assert (read.amateur is None) == thinking


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_a_tokenizer_is_that_of_tokenizer_json_whatever_class_is_named(kind, tmp_path):
    """As DeepSeek-R1-Distill-Llama and DeepSeek-R1-0528-Qwen3 have it: a byte-level tokenizer, named LlamaTokenizer."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe", "<|end|>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    made = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": len(pieces)}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    text = "the  the\n1234 é"
    expected = made.encode(text + "<|end|>").ids
    facts = ModelFacts(tmp_path, len(pieces), 0, "", "", "digest", trusted=False)
    asked = SamplingSettings(system_prompt=None)
    assert TextReader(facts, 256).prompt([{"role": "user", "content": text}], asked) == expected
    assert render(ModelFolder(tmp_path), text, Examination(system_prompt="")) == expected
