"""Reads what the trainer left in a RUN: the figures of its last training, and its evaluations.

In: training/metrics.jsonl (one line per optimizer step, with `step` and `loss`), training/held_out.jsonl (one line per
measurement), training/training.json (which training these are of) and evaluation/*.json (`benchmarks`: name -> `n`,
`accuracy`, `interval`, perhaps `before`; perhaps `models`: the same for each model, `origins`: what each adapter was
trained on, and `curve`). Out: values. Torn lines, and files with other contents, are skipped; early versions wrote
fewer of the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import orjson

from client.runs.parts import MOST_PART_BYTES
from client.runs.run import Run

BASE = "base"
"""The name of the model without an adapter in an evaluation."""


@dataclass(frozen=True)
class HeldOutPoint:
    """A training's figures on its held-out trajectories, after `step` optimizer steps."""

    step: float
    loss: float  # nats, as the next two
    shift: float  # from the base, at kept steps
    other_shift: float  # at the other steps
    agreement: float  # share of the kept steps
    score: float  # decides `train --keep best`; lower is better
    best: float  # 1 if the training found this measurement the best


HELD_OUT_FIGURES = tuple(field.name for field in fields(HeldOutPoint))


@dataclass(frozen=True)
class ShownTraining:
    """The training whose figures RUN/training holds."""

    training_id: str
    adapter: str  # its OUT
    objective: str
    optimizer_steps: int
    adapter_step: int


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter was trained on, as its evaluation recorded it."""

    recorded: bool = False  # False: an early version made the evaluation
    run: str | None = None
    of_this_run: bool | None = None  # None: unknown
    training_id: str | None = None
    objective: str | None = None
    step: int | None = None  # optimizer step

    def is_of(self, training: ShownTraining | None) -> bool | None:
        """Whether the adapter is of this training; None if that is not known."""
        if not self.recorded or (training is None and self.of_this_run is not False):
            return None
        return training is not None and self.training_id == training.training_id


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """The trainer's result of one model on a benchmark: accuracies with 95% intervals."""

    file: str
    name: str
    n: int
    accuracy: tuple[float, float, float]  # value, low, high
    before: tuple[float, float, float] | None  # of the model without an adapter; None: this is that model
    p: float | None  # McNemar's, of the two on the same problems
    adapter: str | None  # None: there is none, or an early version named none
    origin: AdapterOrigin


@dataclass(frozen=True)
class CurvePoint:
    """One checkpoint on a benchmark: the optimizer step, and what the evaluation found."""

    step: int
    accuracy: tuple[float, float, float]  # value, low, high
    fixed: int | None  # None: the base, or several samples per problem
    broken: int | None


@dataclass(frozen=True)
class AccuracyCurve:
    """The checkpoints of one training on a benchmark, by optimizer step. `origin`: of the last."""

    file: str
    name: str
    points: list[CurvePoint]
    origin: AdapterOrigin


def losses_of(run: Run) -> list[tuple[float, float]]:
    """Optimizer step and loss, of every step."""
    return [(step, loss) for step, loss in _training_figures(run, "metrics.jsonl", ("step", "loss"))]


def held_out_of(run: Run) -> list[HeldOutPoint]:
    """The measurements of held-out trajectories."""
    return [HeldOutPoint(*row) for row in _training_figures(run, "held_out.jsonl", HELD_OUT_FIGURES, _scored)]


def shown_training(run: Run) -> ShownTraining | None:
    """The training that RUN/training is of; None if an early version trained, or none."""
    try:
        made = orjson.loads(run.bucket.get("training/training.json", MOST_PART_BYTES) or b"")
        return ShownTraining(
            training_id=str(made["training_id"]),
            adapter=str(made["adapter"]),
            objective=str(made["objective"]),
            optimizer_steps=int(made["optimizer_steps"]),
            adapter_step=int(made["adapter_step"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def evaluated_benchmarks(run: Run) -> list[EvaluatedBenchmark]:
    """Every benchmark of every evaluation, a row per adapter, or one of the model if there is no adapter."""
    found: list[EvaluatedBenchmark] = []
    for file, content in _evaluations(run):
        try:
            for name, last in content["benchmarks"].items():
                found += _adapter_rows(file, name, last, content)
        except (ValueError, KeyError, TypeError, AttributeError):
            found = [row for row in found if row.file != file]
    return found


def accuracy_curves(run: Run) -> list[AccuracyCurve]:
    """The curve of every benchmark of every evaluation that has one."""
    found = []
    for file, content in _evaluations(run):
        try:
            origins = map(_read_origin, content.get("origins", {}).values())
            curves = [
                (str(name), sorted(map(_curve_point, points), key=lambda point: point.step))
                for name, points in content.get("curve", {}).items()
                if len(points) > 1
            ]
            by_step = {origin.step: origin for origin in origins}
            found += [
                AccuracyCurve(file, name, points, by_step.get(points[-1].step, AdapterOrigin()))
                for name, points in curves
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def headline_rows(
    rows: Sequence[EvaluatedBenchmark], training: ShownTraining | None, most: int
) -> list[EvaluatedBenchmark]:
    """The results for the top of a page, one per benchmark and evaluation. The shown training's come first.

    Of several adapters it is that of the shown training, else one that was trained on this RUN, else the last.
    """

    def nearness(row: EvaluatedBenchmark) -> tuple[bool, bool, bool]:
        mine = row.origin.is_of(training) is True
        final = training is not None and row.origin.step == training.adapter_step
        return mine, mine and final, row.origin.of_this_run is True

    found: dict[tuple[str, str], EvaluatedBenchmark] = {}
    for row in rows:
        key = row.file, row.name
        if row.before and (key not in found or nearness(row) >= nearness(found[key])):
            found[key] = row
    return sorted(found.values(), key=nearness, reverse=True)[:most]


def accuracy_is_of(rows: Sequence[EvaluatedBenchmark], training: ShownTraining | None) -> str:
    """What is to be said of the accuracies beside the charts of `training`: "another" if each is known to be of another
    training, "unknown" if it is not recorded of which they are, else "shown".
    """
    found = [row.origin.is_of(training) for row in rows if row.before]
    if not found or any(found) or (training is None and None in found):
        return "shown"
    return "unknown" if None in found else "another"


def _evaluations(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of evaluations that hold a JSON object."""
    for file in run.bucket.names("evaluation"):
        try:
            content = orjson.loads(run.bucket.get(file, MOST_PART_BYTES) or b"")
        except ValueError:
            continue
        if isinstance(content, dict):
            yield file, content


def _adapter_rows(file: str, name: str, last: Any, content: dict[str, Any]) -> list[EvaluatedBenchmark]:
    """A row per adapter. Where the file has no figures of its models, one row of `last`, the last model's."""
    models = content.get("models") or {}
    origins = content.get("origins")
    named = [adapter for adapter in models if adapter != BASE]
    if not named or BASE not in models:
        return [_row(file, name, last, last.get("before"), None, AdapterOrigin())]
    return [
        _row(file, name, models[adapter][name], models[BASE][name], adapter,
             AdapterOrigin() if origins is None else _read_origin(origins.get(adapter) or {}))
        for adapter in named
    ]  # fmt: skip


def _row(
    file: str, name: str, figures: Any, before: Any, adapter: str | None, origin: AdapterOrigin
) -> EvaluatedBenchmark:
    p = float(figures["paired"]["p"]) if figures.get("paired") else None
    n = int(figures["n"])
    if n < 0 or not (p is None or 0 <= p <= 1):
        raise ValueError(f"{figures} are no figures of a benchmark")
    return EvaluatedBenchmark(
        file, str(name), n, _accuracy(figures), _accuracy(before) if before else None, p, adapter, origin
    )


def _read_origin(made: Any) -> AdapterOrigin:
    """An origin as an evaluation wrote it. Values of another type count as unknown."""
    texts = (
        value if isinstance(value := made.get(name), str) else None for name in ("run", "training_id", "objective")
    )
    run, training_id, objective = texts
    same, step = made.get("of_this_run"), made.get("step")
    return AdapterOrigin(
        recorded=True,
        run=run,
        of_this_run=same if isinstance(same, bool) else None,
        training_id=training_id,
        objective=objective,
        step=step if isinstance(step, int) else None,
    )


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    """A line of held_out.jsonl, with loss plus shift at other steps as its score if it was written without one."""
    return {"score": row["loss"] + row["other_shift"], "best": False} | row


def _training_figures(
    run: Run, file: str, names: Sequence[str], completed: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> list[list[float]]:
    """The named figures of each line of a file that the trainer wrote. Torn or incomplete lines are skipped."""
    found = []
    for line in (run.bucket.get(f"training/{file}", MOST_PART_BYTES) or b"").splitlines():
        try:
            row = completed(orjson.loads(line))
            figures = [float(row[name]) for name in names]
            if math.isfinite(sum(figures)):
                found.append(figures)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _curve_point(figures: Any) -> CurvePoint:
    paired, step = figures.get("paired") or {}, int(figures["step"])
    fixed, broken = (int(paired[name]) if name in paired else None for name in ("fixed", "broken"))
    if step < 0:
        raise ValueError(f"{step} is not an optimizer step")
    return CurvePoint(step, _accuracy(figures), fixed, broken)


def _accuracy(figures: Any) -> tuple[float, float, float]:
    low, high = figures["interval"]
    if not 0 <= low <= figures["accuracy"] <= high <= 1:
        raise ValueError(f"{figures} is not an accuracy in its interval")
    return float(figures["accuracy"]), float(low), float(high)
