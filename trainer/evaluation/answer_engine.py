"""Runs vLLM for one model and any number of its adapters, which stay unmerged.

In: prompts as token ids, how to decode. Out: texts, each as soon as it is complete. The only module of the trainer that
loads vLLM.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from client import child_errors
from client.cli.program import importing
from client.environment import environment, sockets_in
from client.errors import ModelError, reason_of
from client.models.mistral import folder_for_vllm, hugging_face_arguments
from trainer.adapters.adapter import read_config
from trainer.adapters.model_folder import ModelFolder
from trainer.settings import Examination, Precision

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.lora.request import LoRARequest

CPU_CACHE_BYTES = 2**30
"""Size of the KV cache on a CPU. vLLM's default takes nearly all of the memory."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
THREADS = "VLLM_CPU_OMP_THREADS_BIND"
AT_ONCE = 512
"""Most unfinished outputs that the engine holds: more than it decodes at a time."""
TOLD_TOKENS = 16
"""New tokens of an output after which the engine reports them."""


class AnswerEngine:
    """A running engine. Decodes by the given settings, and ignores generation_config.json."""

    def __init__(
        self, model: ModelFolder, adapters: Sequence[Path], precision: Precision | None, max_model_len: int
    ) -> None:
        with importing():
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
        self._tokenizer: Any = model.tokenizer  # vLLM's tokenizer may differ from tokenizer.json
        self._requests: dict[Path, LoRARequest] = {}
        self._sockets = tempfile.TemporaryDirectory(prefix="lr-")
        with child_errors.collected() as cause:
            try:
                with environment(self._variables(current_platform.is_cpu())):
                    self.llm = LLM(
                        model=str(folder_for_vllm(model.path)),
                        dtype=model.dtype_for(precision),  # type: ignore[arg-type]
                        generation_config="vllm",
                        max_model_len=max_model_len,
                        use_tqdm_on_load=sys.stderr.isatty(),
                        **options,
                    )
            except Exception as error:  # vLLM raises many kinds for invalid model files
                said = cause() or f"{type(error).__name__}: {reason_of(error)}"
                raise ModelError(
                    f"vLLM could not start {model}: {said}; VLLM_LOGGING_LEVEL=INFO shows its log"
                ) from error
        try:
            if "generate" not in self.llm.llm_engine.get_supported_tasks():
                raise ModelError(f"{model} generates no text, says vLLM; a causal language model is needed")
            for adapter in adapters:
                self.load(adapter)
        except BaseException:
            self.close()
            raise

    def load(self, adapter: Path) -> None:
        """Make an adapter ready for `answers`. Raises ModelError, with the remedy, if vLLM rejects the adapter."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(str(adapter), len(self._requests) + 1, str(adapter))
        try:
            self.llm.llm_engine.add_lora(request)
        except Exception as error:  # vLLM raises many kinds for invalid weights
            raise _refused(adapter, reason_of(error)) from error
        self._requests[adapter] = request

    def answers(
        self,
        prompts: Sequence[list[int]],
        examination: Examination,
        adapter: Path | None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[int, list[str]]]:
        """Yields the index of each prompt with its n outputs, once they are complete. Calls `told` with counts of new
        tokens meanwhile.

        Outputs end where the context ends. They are '' for a prompt that does not fit. Raises ModelError if the engine
        fails.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=examination.n,
            temperature=examination.temperature,
            top_p=examination.top_p,
            seed=examination.seed,
            max_tokens=examination.max_tokens,
            stop_token_ids=self._ends,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=TOLD_TOKENS,
        )
        lora = self._requests[adapter] if adapter else None
        engine, begun = self.llm.llm_engine, dict[int, list[list[int]]]()
        fits = [len(prompt) < self.max_model_len for prompt in prompts]
        yield from ((place, [""] * examination.n) for place, fit in enumerate(fits) if not fit)
        ahead = (place for place, fit in enumerate(fits) if fit)
        while True:
            for place in islice(ahead, max(1, AT_ONCE // examination.n) - len(begun)):
                begun[place] = [[] for _ in range(examination.n)]
                engine.add_request(str(place), tokens_input(prompts[place]), params, lora_request=lora)
            if not begun:
                return
            try:
                outputs = cast("list[RequestOutput]", engine.step())
            except Exception as error:  # any failure of a device or of one of vLLM's processes
                raise ModelError(
                    f"vLLM failed: {type(error).__name__}: {reason_of(error)}; VLLM_LOGGING_LEVEL=INFO "
                    "shows its log, and the same command resumes"
                ) from error
            for output in outputs:
                place = int(output.request_id)
                for one in output.outputs:
                    begun[place][one.index] += one.token_ids
                    told(len(one.token_ids))
                    if one.finish_reason == "stop":
                        begun[place][one.index].pop()  # the end token
                if output.finished:
                    yield place, [self._text(token_ids) for token_ids in begun.pop(place)]

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def close(self) -> None:
        """End the engine and free its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        self._sockets.cleanup()

    def _variables(self, on_cpu: bool) -> dict[str, str]:
        """Environment variables for the start of vLLM: run in this process on a CPU, else use a folder for sockets.

        Otherwise two more processes import vLLM, for some 10 s each. With several NUMA nodes, or if the user binds
        threads, vLLM still gets these processes: it binds threads only there.
        """
        nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
        if on_cpu and IN_PROCESS.keys().isdisjoint(os.environ) and THREADS not in os.environ and len(nodes) < 2:
            return IN_PROCESS
        return sockets_in(self._sockets.name)


def _lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank that vLLM supports and that is enough for all adapters. Raises ModelError if there is none."""
    from vllm.config.lora import MaxLoRARanks

    possible, most = get_args(MaxLoRARanks), 0
    for adapter in adapters:
        config = read_config(adapter)
        if (kind := config["peft_type"]) != "LORA":
            raise _refused(adapter, f"its peft_type is {kind}")
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        wrong = [rank for rank in ranks if not isinstance(rank, int) or not 0 < rank <= max(possible)]
        if wrong:
            raise _refused(adapter, f"its LoRA rank is {wrong[0]}; vLLM applies 1 to {max(possible)}")
        most = max(most, *ranks)
    return min(rank for rank in possible if rank >= most)


def _check_features(adapter: Path) -> None:
    """Raises ModelError if the adapter uses a feature that vLLM does not support, such as DoRA."""
    from vllm.config import LoRAConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    try:
        PEFTHelper.from_local_dir(str(adapter), None).validate_legal(
            LoRAConfig(max_lora_rank=max(get_args(MaxLoRARanks)))
        )
    except (ValueError, TypeError) as error:
        raise _refused(adapter, reason_of(error)) from error
    if read_config(adapter).get("trainable_token_indices"):
        raise _refused(adapter, "it trains rows of an embedding (trainable_token_indices)")


def _refused(adapter: Path, reason: str) -> ModelError:
    return ModelError(
        f"vLLM does not take the adapter {adapter}: {reason}; merge it ('lightreasoner-trainer merge') and evaluate the"
        " merged model"
    )
