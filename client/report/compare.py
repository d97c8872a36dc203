"""Compares RUNs of the same problems and expert, with other amateurs or other settings.

In: RUNs. Out: the same figures of each. Rejects RUNs whose figures would describe different steps, and names the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from client.errors import RunError
from client.report.labels import (
    ShownOverturn,
    label_words,
    selection_words,
    shown_labels,
    shown_overturns,
    style_share,
    style_warning,
    texts_where_readable,
)
from client.runs.build import trajectory_parts
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.runs.tally import Tally

SHARED = ("problems", "expert.", "decoding.", "system_prompt", "chat_template_kwargs", "end_token_ids", "date")
"""Settings that all RUNs must share, as beginnings of the names in `RunManifest.identity`. Others may differ."""


@dataclass(frozen=True)
class Figures:
    """The figures of one RUN. Shares are of its steps from first_step on."""

    run: str
    amateur: str
    amateur_fingerprint: str
    sealed: bool
    top_k: int
    alpha: float
    beta: float  # nats
    first_step: int
    select: str
    labels: str
    keep_incomplete: bool
    trajectories: int
    failed: int
    steps: int
    kept: int
    kept_share: float
    kl_quantiles: dict[str, float]  # nats, of the certified bound
    same_top1: float  # proved
    other_top1: float  # proved; for the rest, the top k do not decide
    mean_plausible_set: float
    mean_label_entropy: float  # nats
    mean_covered_mass: float
    incomplete: int
    gamma: float | None  # of labels tilt
    max_shift: float | None  # nats
    keep: float | None  # of select top
    cut: int  # trajectories that reached max_tokens
    without_kept_steps: int  # trajectories
    overturned_share: float  # of the labels, whose heaviest token is not the expert's best
    mean_shift: float  # nats, of the labels from the expert
    shift_quantiles: dict[str, float]
    largest_shift: float
    style_warning: str | None
    style_share: float | None  # of the shift, from labels that replace one mark by another
    oddest_labels: list[str]  # the farthest first
    overturns: list[ShownOverturn]  # the commonest first


def compare_runs(runs: Sequence[Run]) -> list[Figures]:
    """The figures of each RUN, in order.

    Raises RunError for a single RUN, for a RUN without trajectories, and for one that differs from the first in a
    `SHARED` setting; the message names every such difference.
    """
    if len(runs) < 2:
        raise RunError("compare needs at least two RUNs")
    manifests = [run.manifest() for run in runs]
    for run, manifest in zip(runs, manifests, strict=True):
        trajectory_parts(run, manifest)
        different = [line for line in manifests[0].differences(manifest) if line.startswith(SHARED)]
        if different:
            listed = "\n  ".join(("only the amateur and the selection may differ. These differ too:", *different))
            raise RunError(f"{run} cannot be compared with {runs[0]}; {listed}")
    return [_figures(run, manifest) for run, manifest in zip(runs, manifests, strict=True)]


def _figures(run: Run, manifest: RunManifest) -> Figures:
    tally = Tally(manifest)
    tally.add_all(run.trajectories())
    totals, steps = tally.totals(set(run.failures())), max(tally.steps, 1)
    shifts, texts = totals.label_shifts, texts_where_readable(run)
    return Figures(
        run=str(run),
        amateur=manifest.amateur.id,
        amateur_fingerprint=manifest.amateur.model_fingerprint,
        sealed=run.completion() is not None,
        top_k=manifest.top_k,
        alpha=manifest.alpha,
        beta=manifest.beta,
        first_step=manifest.first_step,
        select=manifest.select,
        labels=manifest.labels,
        keep_incomplete=manifest.keep_incomplete,
        trajectories=totals.trajectories,
        failed=totals.failed,
        steps=totals.steps,
        kept=totals.kept,
        kept_share=totals.kept_share,
        kl_quantiles=totals.kl_quantiles,
        same_top1=tally.agreeing / steps,
        other_top1=tally.differing / steps,
        mean_plausible_set=totals.mean_plausible_set,
        mean_label_entropy=tally.mean_label_entropy,
        mean_covered_mass=totals.mean_covered_mass,
        incomplete=totals.incomplete,
        gamma=manifest.gamma,
        max_shift=manifest.max_shift,
        keep=manifest.keep,
        cut=tally.cut,
        without_kept_steps=tally.without_kept_steps,
        overturned_share=shifts.overturned_share if shifts else 0.0,
        mean_shift=shifts.mean if shifts else 0.0,
        shift_quantiles=shifts.quantiles if shifts else {},
        largest_shift=shifts.largest if shifts else 0.0,
        style_warning=style_warning(tally.shifts, texts, manifest.end_token_ids) if texts else None,
        style_share=style_share(tally.shifts, texts, manifest.end_token_ids) if texts else None,
        oddest_labels=[str(label) for label in shown_labels(tally.shifts, texts)] if texts else [],
        overturns=shown_overturns(tally.shifts, texts) if texts else [],
    )


def comparison_rows(compared: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """The rows of the table: a name, and a cell for each RUN."""
    quantiles = sorted({q for figures in compared for q in figures.kl_quantiles}, key=float)
    shift_quantiles = sorted({q for figures in compared for q in figures.shift_quantiles}, key=float)
    named: dict[str, Callable[[Figures], str]] = {
        "amateur": lambda f: f.amateur,
        "settings": lambda f: f"α {f.alpha:g}, β {f.beta:g}, from step {f.first_step}, top {f.top_k}",
        "selection": lambda f: selection_words(f.select, f.keep) + ", incomplete too" * f.keep_incomplete,
        "labels": lambda f: label_words(f.labels, f.gamma, f.max_shift),
        "complete": lambda f: "yes" if f.sealed else "not yet",
        "trajectories": lambda f: f"{f.trajectories:,}" + (f", {f.failed:,} failed" if f.failed else ""),
        "steps kept": lambda f: f"{f.kept:,} of {f.steps:,}",
        "kept share": lambda f: f"{f.kept_share:.1%}",
        **{f"KL bound, quantile {quantile}": partial(_quantile, quantile) for quantile in quantiles},
        "same best token": lambda f: f"{f.same_top1:.1%}",
        "another best token": lambda f: f"{f.other_top1:.1%}",
        "mean plausible set": lambda f: f"{f.mean_plausible_set:.2f} tokens",
        "mean label entropy": lambda f: f"{f.mean_label_entropy:.3f} nats",
        "covered mass": lambda f: f"{f.mean_covered_mass:.4f}",
        "incomplete sets": lambda f: f"{f.incomplete:,}",
        "cut at --max-tokens": lambda f: f"{f.cut:,}",
        "without a kept step": lambda f: f"{f.without_kept_steps:,}",
        "labels that overturn the expert's best": lambda f: f"{f.overturned_share:.1%}",
        "label shift, mean": lambda f: f"{f.mean_shift:.3f} nats",
        **{f"label shift, quantile {quantile}": partial(_shift_quantile, quantile) for quantile in shift_quantiles},
        "label shift, largest": lambda f: f"{f.largest_shift:.3f} nats",
        "label shift, one mark for another": lambda f: "–" if f.style_share is None else f"{f.style_share:.1%}",
    }
    return [(name, [cell(figures) for figures in compared]) for name, cell in named.items()]


def _shift_quantile(quantile: str, figures: Figures) -> str:
    return f"{figures.shift_quantiles[quantile]:.3f} nats" if quantile in figures.shift_quantiles else "–"


def _quantile(quantile: str, figures: Figures) -> str:
    return f"{figures.kl_quantiles[quantile]:.3f} nats" if quantile in figures.kl_quantiles else "–"
