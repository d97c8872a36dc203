"""The contrast loss, with torch alone: how far the model is from the soft labels at the kept steps.

In: hidden states of kept steps, the LM head, sparse labels. Out: sums over the steps, the loss among them. It never
holds the logits of more than one chunk of steps, also in the backward pass. Knows nothing of models or RUNs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Logits in one chunk: 256 MiB in float32. The backward pass needs about three times as much."""


class StepSums(NamedTuple):
    """Sums over kept steps: scalars in float32. A step whose label has weight 0 adds nothing."""

    loss: Tensor  # D_KL(v_C || pi_theta), nats; the only one with a gradient
    entropy: Tensor  # of the labels, nats
    agreeing: Tensor  # steps whose most likely token is the label's heaviest


def contrast_sums(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    label_ids: Tensor,
    label_weights: Tensor,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> StepSums:
    """The contrast loss of K kept steps, and the sums that are logged with it.

        D_KL(v_C || pi_theta) = sum_a v_C(a) * (log v_C(a) - log pi_theta(a))

    Source: LightReasoner, arXiv 2510.07962, section 3.3. The sum runs over the label's few ids; log pi_theta is
    normalised over the whole vocabulary, in float32 whatever the head's dtype. The head runs on chunks of steps with at
    most `chunk_elements` logits, and again in the backward pass: logits are not kept. A trainable head gets its
    gradient like any other layer.

    Args:
        hidden: [K, d], the states that the head reads.
        head: [n, d] to logits [n, V], any float dtype.
        label_ids: [K, m], int64. If a step has fewer than m ids, any id with weight 0 fills the row.
        label_weights: [K, m], float32. Each row sums to 1, or is all 0.
    """
    rows = max(1, chunk_elements // vocab_size)
    chunks = zip(hidden.split(rows), label_ids.split(rows), label_weights.split(rows), strict=True)
    sums = [checkpoint(_sums_of_chunk, head, *chunk, use_reentrant=False) for chunk in chunks]
    loss, entropy, agreeing = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return StepSums(loss, entropy.detach(), agreeing.detach())


def held_out_terms(logits: Tensor, base_logits: Tensor, label_ids: Tensor, label_weights: Tensor) -> Tensor:
    """The measured terms of each held-out step: [n, 7], float64.

    Columns 0 and 1: whether the step has a label v; whether it has none. Columns 2 to 5, for a step with a label:
    D_KL(v || pi_theta); whether the model's best token is v's heaviest; the total variation distance of v and pi_theta;
    D_KL(pi_theta || pi_0), pi_0 being the base. Column 6, for a step without one: D_KL(pi_theta || pi_0). Other values
    are 0.

    Args:
        logits, base_logits: [n, V], those of the model and those of its base.
        label_ids, label_weights: as `contrast_sums` takes them; a row of weight 0 is a step without a label.
    """
    log_model, log_base = (torch.log_softmax(found.float(), dim=-1) for found in (logits, base_logits))
    labelled, log_given = label_weights.sum(dim=-1) > 0, log_model.gather(-1, label_ids)
    loss = (torch.xlogy(label_weights, label_weights) - label_weights * log_given).sum(dim=-1)
    heaviest = label_ids.gather(-1, label_weights.argmax(dim=-1, keepdim=True))[:, 0]
    agreeing = (log_model.argmax(dim=-1) == heaviest) & labelled
    distance = (label_weights - log_given.exp()).clamp(min=0).sum(dim=-1)  # an id of weight 0 adds nothing
    shift = (log_model.exp() * (log_model - log_base)).sum(dim=-1)
    shifts = shift.masked_fill(~labelled, 0), shift.masked_fill(labelled, 0)  # an infinite shift stays in its column
    columns = labelled, ~labelled, loss, agreeing, distance, *shifts
    return torch.stack([column.double() for column in columns], dim=-1)


def _sums_of_chunk(
    head: Callable[[Tensor], Tensor], hidden: Tensor, label_ids: Tensor, label_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    log_model = logits.gather(-1, label_ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
    log_label_terms = torch.xlogy(label_weights, label_weights)  # 0 log 0 = 0 where a weight of 0 fills a row
    loss = (log_label_terms - label_weights * log_model).sum()
    heaviest = label_ids.gather(-1, label_weights.argmax(dim=-1, keepdim=True))[:, 0]
    agreeing = (logits.argmax(dim=-1) == heaviest) & (label_weights.sum(dim=-1) > 0)
    return loss, -log_label_terms.sum(), agreeing.sum().float()
