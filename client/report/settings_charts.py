"""Charts of a report: what other settings would keep, where and how strongly the models diverge, how training went.

In: findings. Out: markup of charts, and the rows of the table of betas. Counts nothing, reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from client.report.analysis import BETAS, TENTHS
from client.report.charts import Axis, Bars, Line, Mark, Note, Ring, Threshold, chart, decades, even
from client.report.findings import Findings
from client.report.results import AccuracyCurve, HeldOutPoint
from client.runs.tally import Divergences

SMALLEST_KL = 1e-4
"""Beginning of the axis of divergence, in nats. Smaller divergences are drawn in the first bar."""
LARGEST_BETA, SMALLEST_ALPHA = 100.0, 1e-6
"""Ends of the axes of beta and alpha. A RUN's setting beyond them is marked on the edge."""
HEADROOM = 1.12
"""Height of an axis relative to the highest bar: the words at a threshold then stand above the bar."""
CUT = 1.5
"""Largest height of the first bar of divergences, relative to the highest other bar. A higher one runs off the scale,
so that the others stay visible."""


def divergence_chart(findings: Findings) -> tuple[Markup, bool]:
    """Histogram of the steps' divergence, on a logarithmic axis with an edge at beta.

    Also returns whether the first bar runs off the scale, which then fits the other bars.
    """
    bounds = findings.tally.bounds
    low, high = _kl_range(bounds, findings.manifest.beta)
    beta = min(max(findings.manifest.beta, low), high)
    edges = np.unique(np.concatenate([_between(low, beta), _between(beta, high)]))
    above = bounds.above(edges)
    heights = above[:-1] - above[1:]
    heights[0] += bounds.count - above[0]  # no step is above the last edge: the axis reaches the largest
    first, others = int(heights[0]), int(heights[1:].max(initial=0))
    cut = first > CUT * others > 0
    top = float(others if cut else max(first, others, 1))
    marks: list[Mark] = [Bars(edges.tolist(), heights.tolist(), beta)]
    if cut:
        marks.append(Note(float(edges[1]), f"{first:,} steps"))
    marks.append(Threshold(beta, f"β = {findings.manifest.beta:g}"))
    drawn = chart(
        Axis("certified KL bound, nats (logarithmic)", low, high, decades(low, high), log=True),
        Axis("steps", 0.0, HEADROOM * top, even(HEADROOM * top)),
        marks,
        f"Histogram of the divergence of {bounds.count:,} steps; the highest bar stands for {max(first, others):,} of "
        "them" + (f", the next for {others:,}." if cut else "."),
    )
    return drawn, cut


def beta_chart(findings: Findings) -> Markup:
    """The share and number of steps that each beta would keep."""
    tally, manifest = findings.tally, findings.manifest
    if not tally.steps:
        return Markup("")
    low, high = 1e-3, max(4.0, min(2 * manifest.beta, LARGEST_BETA))
    betas = np.geomspace(low, high, 120)
    complete, every = (counts.above(betas) / tally.steps for counts in (tally.complete_bounds, tally.bounds))
    kept = every if manifest.keep_incomplete else complete
    top = float(max(kept.max(initial=0.0), every.max(initial=0.0))) or 1.0
    marks: list[Mark] = [Line(betas.tolist(), kept.tolist())]
    if (every - kept).max() > 0.002:
        marks.append(Line(betas.tolist(), every.tolist(), "second"))
    here = _beta_here(findings) / tally.steps
    marks.append(Threshold(manifest.beta, f"β = {manifest.beta:g}: {percent(here)}", here))
    return chart(
        Axis("β, nats (logarithmic)", low, high, decades(low, high), log=True),
        Axis("kept share of steps", 0.0, HEADROOM * top, [(tick / 100, label) for tick, label in even(100 * top, "%")]),
        marks,
        f"Kept share against beta, falling from {percent(kept[0])} at {low:g} to {percent(kept[-1])} at {high:g}.",
        Axis("kept steps", 0.0, HEADROOM * top * tally.steps, even(top * tally.steps)),
    )


def beta_rows(findings: Findings) -> list[tuple[float, int, float, float, bool]]:
    """Rows of beta, steps that it would keep, their share, their number per trajectory, whether it is the RUN's own."""
    tally, manifest = findings.tally, findings.manifest
    betas = sorted({*BETAS, manifest.beta})
    counts = tally.bounds if manifest.keep_incomplete else tally.complete_bounds
    kept = {beta: _above(counts, beta) for beta in betas}
    kept[manifest.beta] = _beta_here(findings)
    steps, trajectories = max(tally.steps, 1), max(len(tally.keys), 1)
    return [(beta, kept[beta], kept[beta] / steps, kept[beta] / trajectories, beta == manifest.beta) for beta in betas]


def _beta_here(findings: Findings) -> int:
    """Steps that the RUN's own beta keeps: as counted if the RUN selects by divergence, else from the counters."""
    tally, manifest = findings.tally, findings.manifest
    if manifest.select not in ("all", "top"):  # random keeps as many as kl
        return tally.kept
    counts = tally.bounds if manifest.keep_incomplete else tally.complete_bounds
    return _above(counts, manifest.beta)


def _above(counts: Divergences, beta: float) -> int:
    """The number of steps that a beta keeps. A beta beyond float32 counts as the largest float32."""
    return int(counts.above(np.array([min(beta, float(np.finfo(np.float32).max))]))[0])


def alpha_charts(findings: Findings) -> list[Markup]:
    """Mean plausible set, and share proved whole, against alpha."""
    sets, manifest = findings.plausible_sets, findings.manifest
    if sets is None:
        return []
    low = max(float(sets.alphas[0]), SMALLEST_ALPHA)
    x = Axis("α (logarithmic)", low, 1.0, _alpha_ticks(low), log=True)
    size, whole = (float(np.interp(manifest.alpha, sets.alphas, values)) for values in (sets.labelled, sets.whole))
    if manifest.select == "kl" and manifest.labels != "onehot" and findings.tally.kept:
        size = findings.totals.mean_plausible_set  # the figure of the totals, rounded once
    top = float(max(sets.mean_size.max(), sets.labelled.max()))
    sizes: list[Mark] = [Line(sets.alphas.tolist(), sets.labelled.tolist())]
    if np.abs(sets.mean_size - sets.labelled).max() > 0.01 * top:
        sizes.append(Line(sets.alphas.tolist(), sets.mean_size.tolist(), "second"))
    return [
        chart(
            x,
            Axis("mean plausible set, tokens", 0.0, HEADROOM * top, even(HEADROOM * top)),
            [*sizes, Threshold(manifest.alpha, f"α = {manifest.alpha:g}: {size:.2f}", size)],
            f"Mean plausible set against alpha, {size:.2f} tokens at this RUN's.",
        ),
        chart(
            x,
            Axis("sets proved whole", 0.0, HEADROOM, [(tick / 100, label) for tick, label in even(100, "%")]),
            [Line(sets.alphas.tolist(), sets.whole.tolist()),
             Threshold(manifest.alpha, f"α = {manifest.alpha:g}: {percent(whole)}", whole)],
            f"Share of plausible sets proved whole against alpha, {percent(whole)} at this RUN's.",
        ),
    ]  # fmt: skip


def loss_chart(losses: Sequence[tuple[float, float]], held_out: Sequence[HeldOutPoint]) -> Markup | None:
    """The training loss at each optimizer step, and the held-out loss."""
    if len(losses) < 2:
        return None
    steps, values = zip(*losses, strict=True)
    last, top = (
        max(whole) for whole in ([*steps, *(p.step for p in held_out)], [*values, *(p.loss for p in held_out)])
    )
    marks: list[Mark] = [Line(_thinned(steps), _thinned(values))]
    told = f"Training loss from {values[0]:.3f} to {values[-1]:.3f} over {len(values):,} optimizer steps"
    if len(held_out) > 1:
        marks.append(Line([point.step for point in held_out], [point.loss for point in held_out], "second"))
        told += f"; held-out loss from {held_out[0].loss:.3f} to {held_out[-1].loss:.3f}"
    return chart(
        Axis("optimizer step", 0.0, last, even(last)), Axis("loss, nats", 0.0, top, even(top)), marks, f"{told}."
    )


def best_held_out(held_out: Sequence[HeldOutPoint]) -> HeldOutPoint | None:
    """The measurement that the training found best, else the one with the lowest score; None if there are not two."""
    found = [point for point in held_out if point.best]
    return (found[-1] if found else min(held_out, key=lambda point: point.score)) if len(held_out) > 1 else None


def held_out_charts(held_out: Sequence[HeldOutPoint]) -> list[Markup]:
    """Charts of the held-out trajectories: the score and its best step; the shift from the base; the agreement."""
    if (best := best_held_out(held_out)) is None:
        return []
    steps, first, last = [point.step for point in held_out], held_out[0], held_out[-1]
    shifts, others = [point.shift for point in held_out], [point.other_shift for point in held_out]
    scores = [point.score for point in held_out]
    lowest = min(held_out, key=lambda point: point.score)
    if lowest.score == best.score:
        marks: list[Mark] = [Threshold(best.step, f"best: step {best.step:,g}", best.score, ["the lowest"])]
        said = ""
    else:
        why = "the last within a standard", f"error of the lowest, step {lowest.step:,g}"
        marks = [Ring(lowest.step, lowest.score), Threshold(best.step, f"best: step {best.step:,g}", best.score, why)]
        said = f" The lowest is {lowest.score:.3f}, at step {lowest.step:,g}."
    x, highest, top = Axis("optimizer step", 0.0, max(steps), even(max(steps))), max(scores), max(*shifts, *others)
    return [
        chart(
            x,
            Axis("held-out score, the lower the better", 0.0, highest, even(highest)),
            [Line(steps, scores), *marks],
            f"Held-out score, best at step {best.step:,g}: {best.score:.3f}, and {last.score:.3f} at the last.{said}",
        ),
        chart(
            x,
            Axis("shift from the base, nats", 0.0, top, even(top)),
            [Line(steps, shifts), Line(steps, others, "second")],
            f"Shift from the base at the end: {last.shift:.3f} nats at kept steps, {last.other_shift:.3f} at others.",
        ),
        chart(
            x,
            Axis("agreement with the labels", 0.0, 100.0, even(100, "%")),
            [Line(steps, [100 * point.agreement for point in held_out])],
            f"Agreement with held-out labels from {percent(first.agreement)} to {percent(last.agreement)}.",
        ),
    ]


def accuracy_chart(curve: AccuracyCurve) -> Markup:
    """Accuracy by optimizer step, between both ends of its 95% interval."""
    steps = [float(point.step) for point in curve.points]
    values, low, high = ([100 * point.accuracy[index] for point in curve.points] for index in range(3))
    top = max(*high, 1.0)
    best = max(curve.points, key=lambda point: point.accuracy[0])
    return chart(
        Axis("optimizer step", 0.0, max(*steps, 1.0), even(max(*steps, 1.0))),
        Axis(f"accuracy on {curve.name}", 0.0, top, even(top, "%")),
        [Line(steps, low, "second"), Line(steps, high, "second"), Line(steps, values)],
        f"Accuracy on {curve.name} by optimizer step, highest {percent(best.accuracy[0])} at step {best.step:,}.",
    )


def place_chart(findings: Findings) -> Markup:
    """The kept share of the steps in each tenth of their trajectories."""
    shares = (100 * findings.steps.places.share).tolist()
    top = max(shares) or 1.0
    return chart(
        Axis("place in the trajectory", 0.0, 100.0, even(100, "%")),
        Axis("kept share of steps", 0.0, HEADROOM * top, even(HEADROOM * top, "%")),
        [Bars(np.linspace(0, 100, TENTHS + 1).tolist(), shares, 0.0)],
        "Kept share by tenth of the trajectory: " + ", ".join(f"{share:.1f}%" for share in shares) + ".",
    )


def _kl_range(bounds: Divergences, beta: float) -> tuple[float, float]:
    """Both ends of the axis of divergence: `SMALLEST_KL`; the largest of the bounds, 1 nat and twice beta."""
    largest = bounds.quantile(1.0) if bounds.count else 1.0
    return SMALLEST_KL, max(largest, 1.0, min(2 * beta, LARGEST_BETA))


def _between(low: float, high: float) -> np.ndarray:
    """Edges of about equal width on a logarithmic axis, eight per decade."""
    return np.geomspace(low, high, max(2, round(8 * math.log10(high / low)) + 1))


def _alpha_ticks(low: float) -> list[tuple[float, str]]:
    return [(tick, f"{tick:g}") for tick in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= low]


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """About a thousand of the values at most, evenly spaced: more cannot be seen."""
    return values[:: max(1, len(values) // 1000)]


def percent(share: float) -> str:
    return f"{share:.1%}"
