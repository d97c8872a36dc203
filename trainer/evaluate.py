"""Greedy zero-shot pass@1 of a model, and of the same model with an adapter, through one vLLM engine.

In: a model, perhaps an adapter, benchmarks with answers. Out: a result a benchmark. The adapter is applied by
vLLM as it is, unmerged. Everything that can be wrong with the input is found before the engine starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jinja2 import TemplateError
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from client.errors import ModelError
from client.fingerprints import model_folder
from client.problems import read_problems
from trainer.adapter import adapter_folder, check_base, read_config
from trainer.answers import gold_answer, is_correct
from trainer.base import config_of, weights_dtype
from trainer.scores import BenchmarkResult, result
from trainer.settings import Examination, Precision

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
"""Unless the user sets them otherwise, so that the table is what one sees."""
CPU_CACHE_BYTES = 2**30
"""vLLM's own default on a CPU takes nearly all of the memory."""


@dataclass(frozen=True)
class Benchmark:
    """A problem set with answers, rendered for the model."""

    name: str
    prompts: list[list[int]]
    golds: list[str]


class GreedyEngine:
    """vLLM around one model and at most one adapter. Decodes greedily, whatever generation_config.json says."""

    def __init__(self, folder: Path, adapter: Path | None, dtype: Precision | None, max_model_len: int) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": _lora_rank(adapter)} if adapter else {}
        if current_platform.is_cpu():
            options |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
        self.max_model_len = max_model_len
        self.adapter = adapter
        try:
            self.llm = LLM(
                model=str(folder),
                dtype=weights_dtype(dtype, folder),  # type: ignore[arg-type]
                generation_config="vllm",
                max_model_len=max_model_len,
                use_tqdm_on_load=sys.stderr.isatty(),
                **options,
            )
        except (RuntimeError, ValueError) as error:  # vLLM's own log, before this line, has the details
            raise ModelError(f"vLLM could not start {folder}: {str(error).splitlines()[0]}") from error

    def answers(self, prompts: Sequence[list[int]], max_tokens: int, adapted: bool) -> list[str]:
        """An output for every prompt, which vLLM cuts where the context ends; '' for a prompt that does not fit it."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("adapter", 1, str(self.adapter)) if adapted else None
        asked = [index for index, prompt in enumerate(prompts) if len(prompt) < self.max_model_len]
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[index]) for index in asked],
            SamplingParams(temperature=0.0, max_tokens=max_tokens),
            lora_request=lora,
            use_tqdm=sys.stderr.isatty(),
        )
        texts = dict(zip(asked, (output.outputs[0].text for output in outputs), strict=True))
        return [texts.get(index, "") for index in range(len(prompts))]

    def close(self) -> None:
        """End the engine's process."""
        self.llm.llm_engine.engine_core.shutdown()


def evaluate(
    model: str, adapter: str | None, benchmarks: Mapping[str, str], examination: Examination, console: Console
) -> list[BenchmarkResult]:
    """Score a model on benchmarks (name -> file); with an adapter before and after, in the one engine.

    Raises ModelError or ProblemSetError for what is wrong with the input.
    """
    folder = model_folder(model)
    made = adapter_folder(adapter) if adapter else None
    if made:
        read_config(made)
        check_base(made, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = [read_benchmark(name, file, tokenizer, examination) for name, file in benchmarks.items()]
    context = context_for(folder, read, examination.max_tokens, console)
    engine = GreedyEngine(folder, made, examination.dtype, context)
    try:
        before = {b.name: verdicts(engine, b, examination, False, console) for b in read}
        if not made:
            return [result(name, base) for name, base in before.items()]
        return [result(b.name, verdicts(engine, b, examination, True, console), before[b.name]) for b in read]
    finally:
        engine.close()


def read_benchmark(name: str, file: str, tokenizer: PreTrainedTokenizerBase, examination: Examination) -> Benchmark:
    """Read a benchmark and render its questions. Raises ProblemSetError naming a row that will not do."""
    problems = read_problems(file, examination.limit)
    golds = [gold_answer(problem) for problem in problems]
    prompts = [render(tokenizer, examination.system_prompt, problem.question) for problem in problems]
    return Benchmark(name, prompts, golds)


def render(tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str) -> list[int]:
    """A question as the chat template puts it, straight to ids, so that no second BOS is added."""
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path} has no chat template; add chat_template.jinja to the model folder")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": question}]
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except TemplateError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} refuses the prompt: {error}. "
            "Where it knows no system role, give --system-prompt ''"
        ) from error


def context_for(folder: Path, benchmarks: Sequence[Benchmark], max_tokens: int, console: Console) -> int:
    """The context to ask of the engine: what the longest prompt needs, within what the model has.

    Says which prompts do not fit; they are counted as wrong.
    """
    longest = max(len(prompt) for benchmark in benchmarks for prompt in benchmark.prompts)
    context = getattr(config_of(folder).get_text_config(), "max_position_embeddings", None)
    context = min(context or sys.maxsize, longest + max_tokens)
    for benchmark in benchmarks:
        if too_long := sum(len(prompt) >= context for prompt in benchmark.prompts):
            console.print(
                f"warning: {benchmark.name}: {too_long} prompts fill the context of {context} tokens; counted as wrong",
                style="yellow",
                soft_wrap=True,
            )
    return context


def verdicts(
    engine: GreedyEngine, benchmark: Benchmark, examination: Examination, adapted: bool, console: Console
) -> list[bool]:
    """Ask every question, judge every answer."""
    began = time.monotonic()
    outputs = engine.answers(benchmark.prompts, examination.max_tokens, adapted)
    judged = [is_correct(gold, output) for gold, output in zip(benchmark.golds, outputs, strict=True)]
    who = "with the adapter" if adapted else "the model as it is"
    console.print(f"{benchmark.name}: {who}, {len(judged)} problems in {time.monotonic() - began:.1f} s")
    return judged


def _lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM can be set to and that holds the adapter's."""
    from vllm.config.lora import MaxLoRARanks

    rank, possible = read_config(adapter).get("r"), get_args(MaxLoRARanks)
    if rank is None or rank > max(possible):
        raise ModelError(
            f"{adapter} has LoRA rank {rank}; vLLM applies 1 to {max(possible)}. Merge it and evaluate the merged model"
        )
    return min(r for r in possible if r >= rank)
