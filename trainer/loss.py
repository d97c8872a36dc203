"""The contrast loss, in torch alone: how far the model is from the soft labels at the kept steps.

In: logits and sparse labels of kept steps. Out: one number to be minimised. Knows nothing of models or RUNs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrast_loss(logits: Tensor, label_ids: Tensor, label_weights: Tensor) -> Tensor:
    """Mean over K kept steps of D_KL(v_C || pi_theta), in nats: a scalar, float32, never below 0 but for rounding.

        D_KL(v_C || pi_theta) = sum_a v_C(a) * (log v_C(a) - log pi_theta(a))

    Source: LightReasoner, arXiv 2510.07962, section 3.3. The sum runs over the label's few ids; log pi_theta is
    normalised over the whole vocabulary, in float32 whatever the logits' dtype.

    Args:
        logits: [K, V], any float dtype.
        label_ids: [K, m], int64; where a step has fewer than m ids, any id with weight 0 fills the row.
        label_weights: [K, m], float32; each row sums to 1.
    """
    log_model = torch.log_softmax(logits.float(), dim=-1).gather(-1, label_ids)
    log_label_terms = torch.xlogy(label_weights, label_weights)  # 0 log 0 = 0 where weight fills a row
    return (log_label_terms - label_weights * log_model).sum(dim=-1).mean()
