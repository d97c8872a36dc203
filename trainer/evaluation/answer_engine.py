"""Runs vLLM for one model and any number of its adapters, which stay unmerged.

In: prompts as token ids, how to decode. Out: texts. The only room of the trainer that loads vLLM.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from client import child_errors
from client.errors import ModelError, reason_of
from client.models.mistral import folder_for_vllm, hugging_face_arguments
from trainer.adapters.adapter import read_config
from trainer.adapters.model_folder import ModelFolder
from trainer.settings import Examination, Precision

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

CPU_CACHE_BYTES = 2**30
"""vLLM's default on a CPU takes nearly all of the memory."""


class AnswerEngine:
    """A running engine. Decodes as it is told, whatever generation_config.json says."""

    def __init__(
        self, model: ModelFolder, adapters: Sequence[Path], precision: Precision | None, max_model_len: int
    ) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {**hugging_face_arguments(model.path)}
        if adapters:
            options |= {"enable_lora": True, "max_lora_rank": _lora_rank(adapters)}
            for adapter in adapters:
                _check_features(adapter)
        if current_platform.is_cpu():
            options |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
        self.max_model_len, self._ends = max_model_len, model.end_token_ids
        self._tokenizer: Any = model.tokenizer  # vLLM's own may not be tokenizer.json's
        self._requests: dict[Path, LoRARequest] = {}
        with child_errors.collected() as cause:
            try:
                with _in_process() if current_platform.is_cpu() else contextlib.nullcontext():
                    self.llm = LLM(
                        model=str(folder_for_vllm(model.path)),
                        dtype=model.dtype_for(precision),  # type: ignore[arg-type]
                        generation_config="vllm",
                        max_model_len=max_model_len,
                        use_tqdm_on_load=sys.stderr.isatty(),
                        **options,
                    )
            except Exception as error:  # whatever a model's files are wrong in
                said = cause() or f"{type(error).__name__}: {reason_of(error)}"
                raise ModelError(
                    f"vLLM could not start {model}: {said}; VLLM_LOGGING_LEVEL=INFO shows its log"
                ) from error
        try:
            for adapter in adapters:
                self.load(adapter)
        except BaseException:
            self.close()
            raise

    def load(self, adapter: Path) -> None:
        """Make an adapter ready for `answers`. Raises ModelError, with the remedy, if vLLM does not take it."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(str(adapter), len(self._requests) + 1, str(adapter))
        try:
            self.llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever vLLM finds wrong in its weights
            raise _refused(adapter, reason_of(error)) from error
        self._requests[adapter] = request

    def answers(self, prompts: Sequence[list[int]], examination: Examination, adapter: Path | None) -> list[list[str]]:
        """n outputs for every prompt, cut at the end of the context; '' for a prompt that does not fit."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            n=examination.n,
            temperature=examination.temperature,
            top_p=examination.top_p,
            seed=examination.seed,
            max_tokens=examination.max_tokens,
            stop_token_ids=self._ends,
            detokenize=False,
        )
        asked = [index for index, prompt in enumerate(prompts) if len(prompt) < self.max_model_len]
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[index]) for index in asked],
            params,
            lora_request=self._requests[adapter] if adapter else None,
            use_tqdm=False,
        )
        texts = {
            index: [self._text(one.token_ids, one.finish_reason == "stop") for one in output.outputs]
            for index, output in zip(asked, outputs, strict=True)
        }
        return [texts.get(index, [""] * examination.n) for index in range(len(prompts))]

    def _text(self, token_ids: Sequence[int], ended: bool) -> str:
        """An output without its end token."""
        written = list(token_ids[:-1] if ended else token_ids)
        text: str = self._tokenizer.backend_tokenizer.decode(written, skip_special_tokens=True)
        return text

    def close(self) -> None:
        """End the engine and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _in_process() -> Iterator[None]:
    """Let an engine that starts inside run in this process. Otherwise two processes import vLLM for some 10 s each.

    Not with several NUMA nodes, or if the user binds threads: vLLM binds threads only in processes of its own.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if name in os.environ or "VLLM_CPU_OMP_THREADS_BIND" in os.environ or len(nodes) > 1:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank that vLLM supports and that is enough for all adapters."""
    from vllm.config.lora import MaxLoRARanks

    possible, most = get_args(MaxLoRARanks), 0
    for adapter in adapters:
        config = read_config(adapter)
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        wrong = [rank for rank in ranks if not isinstance(rank, int) or not 0 < rank <= max(possible)]
        if wrong:
            raise _refused(adapter, f"its LoRA rank is {wrong[0]}; vLLM applies 1 to {max(possible)}")
        most = max(most, *ranks)
    return min(rank for rank in possible if rank >= most)


def _check_features(adapter: Path) -> None:
    """Raises ModelError if the adapter's settings ask for what vLLM cannot do, such as DoRA."""
    from vllm.config import LoRAConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    try:
        PEFTHelper.from_local_dir(str(adapter), None).validate_legal(
            LoRAConfig(max_lora_rank=max(get_args(MaxLoRARanks)))
        )
    except (ValueError, TypeError) as error:
        raise _refused(adapter, reason_of(error)) from error


def _refused(adapter: Path, reason: str) -> ModelError:
    return ModelError(
        f"vLLM does not take the adapter {adapter}: {reason}; merge it ('lightreasoner-trainer merge') and evaluate the"
        " merged model"
    )
