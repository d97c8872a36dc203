"""The mathematics of the contrast, over one trajectory at a time, in numpy alone.

In: the expert's top-k log-probabilities at each step and the amateur's of the same ids, as the service
returns them. Out: which steps are informative, what can be proved of them, and their soft labels.
Source: LightReasoner, arXiv 2510.07962, sections 3.1 and 3.2. Natural logarithms throughout; sums run in
float64. A log-probability of -inf in the amateur's array marks an id that the amateur does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Selection = Literal["kl", "all", "random"]
Labels = Literal["contrast", "expert", "onehot"]

SMALLEST_REMAINDER = 1e-6
"""q_r is raised to this, which can only lower the bound: the sum of float32 log-probabilities' exponentials is
rounded at about this size, and a remainder that rounding made tiny, or negative, would raise it."""


@dataclass(frozen=True)
class Contrast:
    """The contrast samples of one trajectory: n kept steps and their sparse labels.

    `label_ids` and `label_weights` hold the labels of all kept steps one after another; those of the i-th
    kept step lie at `label_offsets[i]:label_offsets[i + 1]`.
    """

    steps: npt.NDArray[np.int32]  # [n], indices t into token_ids, ascending
    kl_lower_bound: npt.NDArray[np.float32]  # [n], nats
    covered_mass: npt.NDArray[np.float32]  # [n]
    mask_complete: Bools  # [n]
    label_ids: npt.NDArray[np.int32]  # [sum of the plausible-set sizes]
    label_weights: npt.NDArray[np.float32]  # the same shape; each step's weights sum to 1
    label_offsets: npt.NDArray[np.int64]  # [n + 1]
    incomplete: int  # steps t >= first_step with bound > beta but an incomplete plausible set, whatever is kept


def covered_mass(expert_logprobs: Floats, amateur_logprobs: Floats) -> Floats:
    """The expert's probability on the ids that the amateur knows: [T, k] and [T, k] -> [T]."""
    return np.where(np.isfinite(amateur_logprobs), np.exp(expert_logprobs.astype(np.float64)), 0.0).sum(axis=1)


def kl_lower_bound(expert_logprobs: Floats, amateur_logprobs: Floats) -> Floats:
    """A proven lower bound of D_KL(expert || amateur) over the full vocabulary, in nats: [T, k] x 2 -> [T].

    sum_i p_i log(p_i / q_i) + p_r log(p_r / q_r), over the k ids known to the amateur and one remainder
    each, is at most the full divergence (log-sum inequality). q_r is raised to `SMALLEST_REMAINDER`,
    p_r <= 0 contributes nothing; both can only lower the bound. With k the whole vocabulary it is exact.
    """
    log_p, log_q = expert_logprobs.astype(np.float64), amateur_logprobs.astype(np.float64)
    known = np.isfinite(log_q)
    p = np.where(known, np.exp(log_p), 0.0)
    q = np.where(known, np.exp(log_q), 0.0)
    log_ratio = np.subtract(log_p, log_q, where=p > 0, out=np.zeros_like(p))
    p_rest = 1.0 - p.sum(axis=1)
    q_rest = np.maximum(1.0 - q.sum(axis=1), SMALLEST_REMAINDER)
    rest = np.where(p_rest > 0, p_rest * np.log(np.maximum(p_rest, np.finfo(float).tiny) / q_rest), 0.0)
    return (p * log_ratio).sum(axis=1) + rest


def plausible(expert_logprobs: Floats, alpha: float) -> Bools:
    """The plausible set within the top-k, pi_E(a) >= alpha * max pi_E: [T, k] -> [T, k]."""
    log_p = expert_logprobs.astype(np.float64)
    return log_p >= log_p.max(axis=1, keepdims=True) + np.log(alpha)


def mask_complete(expert_logprobs: Floats, amateur_logprobs: Floats, alpha: float, vocab_size: int) -> Bools:
    """Whether the plausible set is proved to be whole, and known to the amateur: [T, k] x 2 -> [T].

    Whole: the k-th id is already implausible, or k is the expert's whole head (`vocab_size` columns).
    """
    mask = plausible(expert_logprobs, alpha)
    whole = ~mask[:, -1] | (expert_logprobs.shape[1] >= vocab_size)
    return whole & ~(mask & ~np.isfinite(amateur_logprobs)).any(axis=1)


def top1(amateur_logprobs: Floats) -> tuple[Bools, Bools]:
    """Whether the amateur's best token is proved to be the expert's best, and proved not to be: [T, k] -> [T] x 2.

    Column 0 is the expert's best id. It is the amateur's too if no other of the k ids has more of the amateur's
    probability and neither could an id outside them, all of which share 1 - sum_i q_i; it is not if another of
    the k has more. Else only the amateur's own best token would tell.
    """
    q = np.exp(amateur_logprobs.astype(np.float64))
    best = q[:, 0]
    beaten = (q[:, 1:] > best[:, None]).any(axis=1) | ~np.isfinite(amateur_logprobs[:, 0])
    return ~beaten & (best >= 1.0 - q.sum(axis=1)), beaten


def contrast(
    top_ids: npt.NDArray[np.int32],
    expert_logprobs: Floats,
    amateur_logprobs: Floats,
    *,
    alpha: float,
    beta: float,
    first_step: int,
    vocab_size: int,
    keep_incomplete: bool = False,
    select: Selection = "kl",
    labels: Labels = "contrast",
    token_ids: npt.NDArray[np.int32] | None = None,
    seed: int = 0,
) -> Contrast:
    """Select steps of a trajectory and label them.

    Args:
        top_ids, expert_logprobs, amateur_logprobs: [T, k], row t is step t, best id of the expert first.
        alpha: plausibility threshold, 0 < alpha <= 1.
        beta: a step is informative when its certified KL bound is above this, in nats.
        first_step: steps before this one are never kept (the published code starts at 1).
        vocab_size: columns of the expert's head.
        keep_incomplete: also keep steps whose plausible set is not complete, labelled on the plausible ids that
            are known.
        select: of the steps that may be kept, "kl" keeps the informative ones, "all" every one, and "random" as
            many as "kl" would, drawn by `seed` from the complete ones. The last two are what "kl" has to beat.
        labels: "contrast", "expert" or "onehot"; see `_log_weights`. "onehot" needs `token_ids`.
        token_ids: [T], the trajectory.
        seed: of the draw, at least 0; it decides alone, so give each trajectory its own.
    """
    bound = kl_lower_bound(expert_logprobs, amateur_logprobs)
    complete = mask_complete(expert_logprobs, amateur_logprobs, alpha, vocab_size)
    labelled = plausible(expert_logprobs, alpha) & np.isfinite(amateur_logprobs)
    reached = np.arange(len(bound)) >= first_step
    eligible = reached & (labelled.any(axis=1) if keep_incomplete else complete)
    informative = reached & (bound > beta)
    steps = np.flatnonzero(eligible if select == "all" else eligible & informative)
    if select == "random":
        steps = _drawn(np.flatnonzero(reached & complete), len(steps), seed)
    if labels == "onehot":
        assert token_ids is not None, "onehot labels are the trajectory's own tokens"
        ids, mask = token_ids[:, None][steps], np.ones((len(steps), 1), bool)
        weights = np.ones(mask.shape)
    else:
        ids, mask = top_ids[steps], labelled[steps]
        log_weights = _log_weights(labels, expert_logprobs[steps], amateur_logprobs[steps], mask)
        weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True, initial=-np.inf, where=mask))
        weights /= weights.sum(axis=1, keepdims=True)
    return Contrast(
        steps=steps.astype(np.int32),
        kl_lower_bound=bound[steps].astype(np.float32),
        covered_mass=covered_mass(expert_logprobs, amateur_logprobs)[steps].astype(np.float32),
        mask_complete=complete[steps],
        label_ids=ids[mask].astype(np.int32),
        label_weights=weights[mask].astype(np.float32),
        label_offsets=np.concatenate(([0], mask.sum(axis=1).cumsum())).astype(np.int64),
        incomplete=int((informative & ~complete).sum()),
    )


def _log_weights(labels: Labels, log_p: Floats, log_q: Floats, mask: Bools) -> Floats:
    """What a softmax over `mask` turns into the label: [n, k] x 3 -> [n, k], float64, -inf outside the mask.

    contrast: v_C(a) proportional to exp(log pi_E(a) - log pi_A(a)). expert: pi_E renormalised, the amateur
    playing no part in it.
    """
    log_weights = np.full(mask.shape, -np.inf)
    other = log_q if labels == "contrast" else np.zeros_like(log_q)
    np.subtract(log_p, other, where=mask, out=log_weights, dtype=np.float64)
    return log_weights


def _drawn(candidates: npt.NDArray[np.intp], count: int, seed: int) -> npt.NDArray[np.intp]:
    """`count` of the candidates, ascending, each as likely as any other.

    Raw bits of Philox, a stream that numpy keeps from release to release, so that a draw can be made again.
    """
    rank = np.random.Philox(seed).random_raw(len(candidates))
    return np.sort(candidates[np.argsort(rank, kind="stable")[:count]])
