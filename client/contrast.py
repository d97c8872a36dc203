"""The mathematics of the contrast, of one trajectory or of several together, with numpy alone.

In: at each step the expert's top-k log-probabilities, and the amateur's of the same ids, as the service returns them.
Out: which steps to keep, a proved lower bound of their divergence, and their soft labels. Source: LightReasoner,
arXiv 2510.07962, sections 3.1 and 3.2. All logarithms are natural; sums are in float64. A log-probability of -inf in
the amateur's array marks an id that the amateur does not know.

A label depends only on the two models' log-probabilities of the plausible ids: normalisation, and the probability of
other ids, cancel. So if the plausible set is proved to be complete, every kind of label, bounded or not, is exactly the
label over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Selection = Literal["kl", "all", "random", "top"]
Labels = Literal["contrast", "expert", "onehot", "tilt"]

DEFAULT_GAMMA = 0.5
"""Gamma of tilt labels: how far the contrast moves the expert."""
BISECTIONS = 50
"""Bisection steps over [0, 1]: they find the largest s to 1e-15."""

SMALLEST_REMAINDER = 1e-6
"""The least value of q_r. Sums of float32 probabilities have rounding errors of about this size: a remainder that is
too small, or negative, by rounding would raise the bound. A larger q_r can only lower it."""


@dataclass(frozen=True)
class Contrast:
    """The contrast samples of one trajectory: n kept steps and their sparse labels.

    `label_ids` and `label_weights` hold the labels of all kept steps, one step after the other. The i-th kept step has
    `label_offsets[i]:label_offsets[i + 1]`.
    """

    steps: npt.NDArray[np.int32]  # [n], indices t into token_ids, ascending
    kl_lower_bound: npt.NDArray[np.float32]  # [n], nats
    covered_mass: npt.NDArray[np.float32]  # [n]
    mask_complete: Bools  # [n]
    label_ids: npt.NDArray[np.int32]  # [sum of the plausible-set sizes]
    label_weights: npt.NDArray[np.float32]  # the same shape; each step's weights sum to 1
    label_offsets: npt.NDArray[np.int64]  # [n + 1]
    incomplete: int  # steps t >= first_step with bound > beta and an incomplete plausible set, kept or not


@dataclass(frozen=True)
class LabelShifts:
    """How far the labels of n kept steps are from the expert's own predictions."""

    nats: Floats  # [n], D_KL(label || expert on the plausible set)
    overturned: Bools  # [n], whether the label's heaviest id is less probable to the expert than the expert's best
    heaviest: npt.NDArray[np.int32]  # [n], the label's heaviest id
    weight: Floats  # [n], its weight
    columns: npt.NDArray[np.intp]  # [n], its column in the top k; k if it is not among them


@dataclass(frozen=True)
class StepFigures:
    """Figures of all T steps of a trajectory, kept or not: computed once for selection, labels and counts."""

    kl_lower_bound: Floats  # [T], nats
    covered_mass: Floats  # [T]
    labelled: Bools  # [T, k], the ids that a label can have: plausible, and known to the amateur
    complete: Bools  # [T], `mask_complete`
    same_top1: Bools  # [T], proved the same, as in `top1`
    other_top1: Bools  # [T], proved different


def step_figures(expert_logprobs: Floats, amateur_logprobs: Floats, alpha: float, vocab_size: int) -> StepFigures:
    """Compute `kl_lower_bound`, `covered_mass`, `mask_complete` and `top1` together: [T, k] x 2."""
    known, p, q = _probabilities(expert_logprobs, amateur_logprobs)
    p_known, q_known = p.sum(axis=1), q.sum(axis=1)
    mask = plausible(expert_logprobs, alpha)
    labelled, complete = mask & known, _none_outside(mask, vocab_size)
    if not known.all():
        complete &= ~(mask & ~known).any(axis=1)
    same, other = _top1(q, q_known, known[:, 0])
    return StepFigures(
        kl_lower_bound=_bound(expert_logprobs, amateur_logprobs, p, p_known, q_known),
        covered_mass=p_known,
        labelled=labelled,
        complete=complete,
        same_top1=same,
        other_top1=other,
    )


def covered_mass(expert_logprobs: Floats, amateur_logprobs: Floats) -> Floats:
    """The expert's probability on the ids that the amateur knows: [T, k] and [T, k] -> [T]."""
    return _probabilities(expert_logprobs, amateur_logprobs)[1].sum(axis=1)


def kl_lower_bound(expert_logprobs: Floats, amateur_logprobs: Floats) -> Floats:
    """A proven lower bound of D_KL(expert || amateur) over the full vocabulary, in nats: [T, k] x 2 -> [T].

    sum_i p_i log(p_i / q_i) + p_r log(p_r / q_r) is at most the full divergence (log-sum inequality). i runs over those
    of the k ids that the amateur knows; p_r and q_r are the remainders. q_r is at least `SMALLEST_REMAINDER`, and
    p_r <= 0 contributes nothing: both can only lower the bound. If k is the whole vocabulary, the bound is exact.
    """
    _, p, q = _probabilities(expert_logprobs, amateur_logprobs)
    return _bound(expert_logprobs, amateur_logprobs, p, p.sum(axis=1), q.sum(axis=1))


def plausible(expert_logprobs: Floats, alpha: float) -> Bools:
    """The plausible set within the top-k, pi_E(a) >= alpha * max pi_E: [T, k] -> [T, k]."""
    log_p = expert_logprobs.astype(np.float64)
    return log_p >= log_p.max(axis=1, keepdims=True) + np.log(alpha)


def mask_complete(expert_logprobs: Floats, amateur_logprobs: Floats, alpha: float, vocab_size: int) -> Bools:
    """Whether the plausible set is proved to be complete: [T, k] x 2 -> [T].

    It is complete if the amateur knows all of its ids, and either the k-th id is not plausible or k is the expert's
    whole head (`vocab_size` columns).
    """
    mask = plausible(expert_logprobs, alpha)
    return _none_outside(mask, vocab_size) & ~(mask & ~np.isfinite(amateur_logprobs)).any(axis=1)


def top1(amateur_logprobs: Floats) -> tuple[Bools, Bools]:
    """Whether the amateur's best token is proved to be the expert's best, and proved not to be: [T, k] -> [T] x 2.

    Column 0 is the expert's best id. It is proved to be the amateur's best if the amateur gives a larger probability to
    no other of the k ids, and cannot give one to any other id: those share 1 - sum_i q_i. It is proved not to be if
    another of the k ids is more probable, or if the amateur does not know it. Otherwise the k ids do not decide.
    """
    q = np.exp(amateur_logprobs.astype(np.float64))
    return _top1(q, q.sum(axis=1), np.isfinite(amateur_logprobs[:, 0]))


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
    gamma: float = DEFAULT_GAMMA,
    max_shift: float | None = None,
    cut: tuple[float, int] | None = None,
    token_ids: npt.NDArray[np.int32] | None = None,
    seed: int = 0,
    figures: StepFigures | None = None,
) -> Contrast:
    """Select steps of a trajectory and label them.

    Args:
        top_ids, expert_logprobs, amateur_logprobs: [T, k], row t is step t, best id of the expert first.
        alpha: plausibility threshold, 0 < alpha <= 1.
        beta: a step is informative if its KL bound is above this, in nats.
        first_step: steps before this one are never kept. The published code starts at 1.
        vocab_size: columns of the expert's head.
        keep_incomplete: also keep steps whose plausible set is incomplete. Their labels have the known plausible ids.
        select: "kl" keeps the informative steps, "all" every step, "top" the steps down to `cut`, and "random" draws as
            many of the complete steps as "kl" keeps.
        labels: "contrast", "expert", "tilt" or "onehot"; see `_log_labels`. "onehot" needs `token_ids`.
        gamma: for "tilt", at least 0.
        max_shift: the largest divergence of a "contrast" or "tilt" label from the expert, in nats; see
            `_bounded_labels`.
        cut: for "top": the least bound to keep, in nats, and the last step to keep with exactly that bound.
        token_ids: [T], the trajectory.
        seed: seed of "random", at least 0. Give each trajectory its own: equal seeds draw alike.
        figures: `step_figures` of the same arguments, if already computed.
    """
    whole, _ = contrast_together(
        np.array([0, len(top_ids)]),
        top_ids,
        expert_logprobs,
        amateur_logprobs,
        alpha=alpha,
        beta=beta,
        first_step=first_step,
        vocab_size=vocab_size,
        keep_incomplete=keep_incomplete,
        select=select,
        labels=labels,
        gamma=gamma,
        max_shift=max_shift,
        cuts=[cut] if cut else (),
        token_ids=token_ids,
        seeds=[seed],
        figures=figures,
    )
    return whole


def contrast_together(
    begins: npt.NDArray[np.integer],
    top_ids: npt.NDArray[np.int32],
    expert_logprobs: Floats,
    amateur_logprobs: Floats,
    *,
    alpha: float,
    beta: float,
    first_step: int,
    vocab_size: int,
    keep_incomplete: bool,
    select: Selection,
    labels: Labels,
    gamma: float,
    max_shift: float | None,
    cuts: Sequence[tuple[float, int]],
    token_ids: npt.NDArray[np.int32] | None,
    seeds: Sequence[int],
    figures: StepFigures | None,
) -> tuple[Contrast, npt.NDArray[np.integer]]:
    """`contrast` of m trajectories, one after the other in the arrays, and the `incomplete` of each: [m].

    `begins`: the first step of each trajectory among all steps, then the number of all steps: [m + 1]. `cuts`, `seeds`:
    one for each trajectory, for "top" and "random". The result's `steps` count through all trajectories; `divided`
    splits it.
    """
    figures = figures or step_figures(expert_logprobs, amateur_logprobs, alpha, vocab_size)
    bound, complete, labelled = figures.kl_lower_bound, figures.complete, figures.labelled
    owners = owners_of(begins)
    places = np.arange(len(bound)) - begins[:-1][owners]
    reached = places >= first_step
    may_be_kept = reached & (labelled.any(axis=1) if keep_incomplete else complete)
    informative = reached & (bound > beta)
    if select == "top":
        assert cuts, "select top needs a cut, which depends on the whole RUN"
        least, last = (np.array(values)[owners] for values in zip(*cuts, strict=True))
        order = ordered(bound)
        chosen = (order > least) | ((order == least) & (places <= last))
    else:
        chosen = np.ones(len(bound), bool) if select == "all" else informative
    steps = np.flatnonzero(may_be_kept & chosen)
    if select == "random":
        may_be_drawn = reached & complete
        steps = np.concatenate([
            begin + _drawn(np.flatnonzero(may_be_drawn[begin:end]), int(((steps >= begin) & (steps < end)).sum()), seed)
            for begin, end, seed in zip(begins[:-1], begins[1:], seeds, strict=True)
        ])  # fmt: skip
    if labels == "onehot":
        assert token_ids is not None, "onehot labels are the trajectory's own tokens"
        ids, mask = token_ids[:, None][steps], np.ones((len(steps), 1), bool)
        weights = np.ones(mask.shape)
    else:
        ids, mask = top_ids[steps], labelled[steps]
        logprobs = expert_logprobs[steps], amateur_logprobs[steps]
        log_label = _log_labels(labels, gamma, *logprobs, mask)
        if max_shift is not None:
            log_label = _bounded_labels(max_shift, log_label, _log_labels("expert", 0.0, *logprobs, mask))
        weights = np.exp(log_label)
    incomplete = np.bincount(owners[informative & ~complete], minlength=len(begins) - 1)
    whole = Contrast(
        steps=steps.astype(np.int32),
        kl_lower_bound=bound[steps].astype(np.float32),
        covered_mass=figures.covered_mass[steps].astype(np.float32),
        mask_complete=complete[steps],
        label_ids=ids[mask].astype(np.int32),
        label_weights=weights[mask].astype(np.float32),
        label_offsets=np.concatenate(([0], mask.sum(axis=1).cumsum())).astype(np.int64),
        incomplete=int(incomplete.sum()),
    )
    return whole, incomplete


def divided(
    whole: Contrast, begins: npt.NDArray[np.integer], incomplete: npt.NDArray[np.integer]
) -> Iterator[Contrast]:
    """Split a result of `contrast_together` into the `Contrast` of each trajectory.

    Arrays other than `steps` and `label_offsets` are views of `whole`'s.
    """
    places = np.searchsorted(whole.steps, begins).tolist()
    labels = whole.label_offsets[places].tolist()
    for index, (begin, missed) in enumerate(zip(begins[:-1].tolist(), incomplete.tolist(), strict=True)):
        here, there = slice(*places[index : index + 2]), slice(*labels[index : index + 2])
        yield Contrast(
            steps=whole.steps[here] - np.int32(begin),
            kl_lower_bound=whole.kl_lower_bound[here],
            covered_mass=whole.covered_mass[here],
            mask_complete=whole.mask_complete[here],
            label_ids=whole.label_ids[there],
            label_weights=whole.label_weights[there],
            label_offsets=whole.label_offsets[here.start : here.stop + 1] - there.start,
            incomplete=missed,
        )


def owners_of(begins: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """The part of each of n places: [m + 1] -> [n]. `begins`: the first place of each of m parts, then n."""
    return np.repeat(np.arange(len(begins) - 1), np.diff(begins))


def ordered(bound: Floats) -> Floats:
    """Bounds as `top` orders them, in float32: [T] -> [T]. The last digits of float64 depend on the processor."""
    return bound.astype(np.float32).astype(np.float64)


def eligible(
    expert_logprobs: Floats, amateur_logprobs: Floats, *, alpha: float, first_step: int, vocab_size: int,
    keep_incomplete: bool,
) -> Bools:  # fmt: skip
    """Which steps any selection may keep: [T, k] x 2 -> [T]. The arguments are those of `contrast`."""
    if keep_incomplete:
        may_be_kept = _labelled(expert_logprobs, amateur_logprobs, alpha).any(axis=1)
    else:
        may_be_kept = mask_complete(expert_logprobs, amateur_logprobs, alpha, vocab_size)
    return may_be_kept & (np.arange(len(expert_logprobs)) >= first_step)


def label_shifts(
    kept: Contrast, top_ids: npt.NDArray[np.int32], expert_logprobs: Floats, amateur_logprobs: Floats, alpha: float,
    labelled: Bools | None = None,
) -> LabelShifts:  # fmt: skip
    """How far each label lies from the expert: D_KL(w || pi_E), pi_E renormalised on the plausible set.

    `kept`: the result of `contrast` with these arrays, [T, k], and `alpha`. `labelled`: as in `StepFigures`, if known.
    A labelled id that is not plausible ("onehot") joins the set. If it is not among the top k, it counts with the k-th
    probability, which can only lower the result.
    """
    steps, sizes = kept.steps, np.diff(kept.label_offsets)
    n, k = len(steps), top_ids.shape[1]
    rows = np.repeat(np.arange(n), sizes)
    log_p = expert_logprobs[steps].astype(np.float64)
    found = top_ids[steps][rows] == kept.label_ids[:, None]  # [labels, k]
    columns = np.where(found.any(axis=1), found.argmax(axis=1), k)
    log_p_label = log_p[rows, np.minimum(columns, k - 1)]
    mask = _labelled(expert_logprobs[steps], amateur_logprobs[steps], alpha) if labelled is None else labelled[steps]
    joins = ~mask[rows, np.minimum(columns, k - 1)] | (columns == k)
    mass = np.where(mask, np.exp(log_p), 0.0).sum(axis=1)
    if joins.any():
        np.add.at(mass, rows[joins], np.exp(log_p_label[joins]))
    weights = kept.label_weights.astype(np.float64)
    log_w = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    nats = np.bincount(rows, weights * (log_w - log_p_label), n) + np.log(mass)
    # The heaviest id of each label. Among equal weights, the one that the expert prefers: nothing is overturned then.
    order = np.lexsort((-log_p_label, -weights, rows))[kept.label_offsets[:-1]]
    return LabelShifts(
        nats=np.maximum(nats, 0.0),
        overturned=log_p_label[order] < log_p.max(axis=1),
        heaviest=kept.label_ids[order],
        weight=weights[order],
        columns=columns[order],
    )


def _probabilities(expert_logprobs: Floats, amateur_logprobs: Floats) -> tuple[Bools, Floats, Floats]:
    """Which ids the amateur knows, and both models' probabilities of these, else 0: [T, k] x 2 -> [T, k] x 3."""
    known = np.isfinite(amateur_logprobs)
    p, q = np.exp(expert_logprobs.astype(np.float64)), np.exp(amateur_logprobs.astype(np.float64))
    return (known, p, q) if known.all() else (known, np.where(known, p, 0.0), np.where(known, q, 0.0))


def _bound(expert_logprobs: Floats, amateur_logprobs: Floats, p: Floats, p_known: Floats, q_known: Floats) -> Floats:
    """`kl_lower_bound` from `_probabilities` and their sums."""
    log_p, log_q, there = expert_logprobs.astype(np.float64), amateur_logprobs.astype(np.float64), p > 0
    log_ratio = log_p - log_q if there.all() else np.subtract(log_p, log_q, where=there, out=np.zeros_like(p))
    p_rest = 1.0 - p_known
    q_rest = np.maximum(1.0 - q_known, SMALLEST_REMAINDER)
    rest = np.where(p_rest > 0, p_rest * np.log(np.maximum(p_rest, np.finfo(float).tiny) / q_rest), 0.0)
    return (p * log_ratio).sum(axis=1) + rest


def _none_outside(mask: Bools, vocab_size: int) -> Bools:
    """Whether no plausible id can be outside the top k: [T, k] -> [T]."""
    return ~mask[:, -1] | (mask.shape[1] >= vocab_size)


def _top1(q: Floats, q_known: Floats, best_known: Bools) -> tuple[Bools, Bools]:
    """`top1` from the amateur's probabilities and their sums."""
    best = q[:, 0]
    beaten = (q.max(axis=1) > best) | ~best_known
    return ~beaten & (best >= 1.0 - q_known), beaten


def _labelled(expert_logprobs: Floats, amateur_logprobs: Floats, alpha: float) -> Bools:
    """The ids that a label can have: plausible, and known to the amateur: [T, k] x 2 -> [T, k]."""
    return plausible(expert_logprobs, alpha) & np.isfinite(amateur_logprobs)


def _log_labels(labels: Labels, gamma: float, log_p: Floats, log_q: Floats, mask: Bools) -> Floats:
    """The logarithms of the labels: [n, k] x 3 -> [n, k], float64, normalised over `mask`, -inf outside it.

    contrast: proportional to pi_E(a) / pi_A(a), the paper's v_C. expert: to pi_E(a), without the amateur. tilt: to
    pi_E(a) (pi_E(a) / pi_A(a))^gamma, the tempered form of W2S-OPD (arXiv 2607.26246), which keeps more of the expert's
    own preferences; gamma = 0 gives the expert's label.
    """
    favour, against = {"contrast": (1.0, 1.0), "expert": (1.0, 0.0), "tilt": (1.0 + gamma, gamma)}[labels]
    values = np.full(mask.shape, -np.inf)
    values[mask] = favour * log_p[mask].astype(np.float64) - against * log_q[mask].astype(np.float64)
    return _log_softmax(values)


def _log_softmax(values: Floats) -> Floats:
    """The log-softmax of each row; -inf stays -inf: [n, k] -> [n, k]."""
    values = values - values.max(axis=1, keepdims=True, initial=np.finfo(float).min)
    with np.errstate(divide="ignore"):
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def _bounded_labels(most: float, log_label: Floats, log_expert: Floats) -> Floats:
    """Labels at most `most` nats from the expert: [n, k] x 2 -> [n, k], all normalised logarithms.

    w_s is proportional to pi_E^(1-s) v^s, with the largest s in [0, 1] for which D_KL(w_s || pi_E) <= most; pi_E is
    renormalised on the plausible set. The divergence grows with s, at the rate s Var_{w_s}(log v / pi_E), so bisection
    finds it. Budgets of divergence: arXiv 2604.14084, 2605.26844.
    """
    bounded = log_label.copy()
    far = np.flatnonzero(_divergence(log_label, log_expert) > most)
    label, expert = log_label[far], log_expert[far]
    inside = np.isfinite(expert)
    toward = np.subtract(label, expert, where=inside, out=np.zeros_like(expert))

    def moved(s: Floats) -> Floats:
        return _log_softmax(expert + s[:, None] * toward)

    low, high = np.zeros(len(far)), np.ones(len(far))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        near = _divergence(moved(middle), expert) <= most
        low, high = np.where(near, middle, low), np.where(near, high, middle)
    bounded[far] = moved(low)
    return bounded


def _divergence(log_w: Floats, log_p: Floats) -> Floats:
    """D_KL(w || p) in nats over the ids where p is above 0: [n, k] x 2 -> [n]."""
    inside = np.isfinite(log_p)
    terms = np.subtract(log_w, log_p, where=inside, out=np.zeros_like(log_p))
    return np.where(inside, np.exp(log_w) * terms, 0.0).sum(axis=1)


def _drawn(candidates: npt.NDArray[np.intp], count: int, seed: int) -> npt.NDArray[np.intp]:
    """`count` of the candidates, ascending; each is equally likely.

    It uses the raw bits of Philox: numpy keeps that stream the same in every release, so a draw can be repeated.
    """
    rank = np.random.Philox(seed).random_raw(len(candidates))
    return np.sort(candidates[np.argsort(rank, kind="stable")[:count]])
