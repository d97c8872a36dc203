"""Checks that a model can be trained on packed trajectories, before the first step.

In: the adapted model. Out: nothing, or a ModelError that says what is wrong. It costs a few forward passes over some
dozen tokens. It finds models with a state that runs across packed trajectories (Mamba and its hybrids), models that
ignore position_ids, and models that change the logits after their LM head.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from client.errors import ModelError
from trainer.training.lora import Head, hidden_states

TOKENS = 24, 40
"""Lengths of the two sequences. Both are longer than the reach of common causal convolutions."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.1
"""Largest relative difference of a row of logits. Rounding in bfloat16 gives about 0.01; a leak gives about 1."""


def check_packing(adapted: PeftModel, name: str) -> None:
    """Raises ModelError if a row of logits differs between the packed pass and the model's own pass."""
    model: Any = adapted.get_base_model()
    decoder, head = model.get_decoder(), Head(model)
    ids = torch.randint(head.vocab_size, (1, sum(TOKENS)), generator=torch.Generator().manual_seed(0), device="cpu").to(
        model.device
    )
    positions = torch.cat([torch.arange(length) for length in TOKENS])[None].to(model.device)
    training = model.training
    model.eval()
    try:
        # With gradients: some kinds of attention do not support them everywhere, and raise an error here.
        states = hidden_states(decoder, ids, positions)
        with torch.no_grad():
            packed = head(states[0])
            alone = [head(hidden_states(decoder, part, place)[0]) for part, place in _parts(ids, positions)]
            own = [
                type(model).forward(model, input_ids=part, use_cache=False).logits[0]
                for part, _ in _parts(ids, positions)
            ]
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{name} cannot be trained on packed trajectories: {error}") from error
    finally:
        model.train(training)
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if (found := _difference(torch.cat(alone), torch.cat(own))) > tolerance:
        raise ModelError(
            f"{name}: the model's logits are not its LM head's, or not only (they differ by {found:.2g} of their "
            "size); this architecture is not supported"
        )
    if (found := _difference(packed, torch.cat(own))) > tolerance:
        raise ModelError(
            f"{name}: trajectories packed into one sequence disturb each other (logits differ by {found:.2g} of their "
            "size); try another --attention, or another architecture: one with a recurrent state cannot be packed"
        )


def _parts(ids: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(ids.split(TOKENS, dim=1), positions.split(TOKENS, dim=1), strict=True))


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of two rows, ||a - b|| / ||b - mean b||."""
    one, other = one.float(), other.float()
    spread = (other - other.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((one - other).norm(dim=-1) / spread.clamp_min(1e-6)).max())
