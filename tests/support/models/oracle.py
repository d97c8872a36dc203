"""The reference for the service's answers: full-vocabulary log-probabilities by transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from client.protocol.requests import Trajectory


class Oracle:
    """One model in float32."""

    def __init__(self, folder: Path, device: str = "cpu", attention: str | None = None) -> None:
        """`attention`: attn_implementation of transformers. For some families only `eager` computes everything."""
        options = {"attn_implementation": attention} if attention else {}
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().to(device)

    @property
    def columns(self) -> int:
        """Columns of the model's LM head. Ids from this number on are unknown to the model."""
        return int(self._model.config.get_text_config().vocab_size)

    @torch.inference_mode()
    def logprobs(self, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """Row t predicts completion[t]: [T, V], natural logs."""
        ids = torch.tensor(np.concatenate((prompt, completion)).astype(np.int64), device=self._model.device)[None]
        logits = self._model(ids).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1).cpu().numpy()


def disagreement(rows: np.ndarray, exact: np.ndarray, top_ids: np.ndarray) -> float:
    """The largest |difference| between returned rows [T, k] and the exact rows [T, V] at the same ids."""
    return float(np.abs(rows - np.take_along_axis(exact, top_ids.astype(np.int64), axis=1)).max())


def first_tie(expert: Oracle, trajectory: Trajectory, margin: float = 1e-4) -> int:
    """The first step whose two best log-probabilities differ by less than `margin`; T if there is none."""
    best = np.sort(expert.logprobs(trajectory.prompt_token_ids, trajectory.token_ids), axis=1)[:, -2:]
    ties = np.flatnonzero(best[:, 1] - best[:, 0] < margin)
    return int(ties[0]) if len(ties) else len(trajectory.token_ids)
