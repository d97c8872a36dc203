"""The paper's two tables for any pair: what each part of the method contributes, and its cost compared with SFT.

In: RUNs, the expert, benchmarks, seeds. Out: adapters in one folder; tables as figures, text and Markdown. Each
training is a process of its own, started with the public command; one engine then evaluates all adapters. Finished work
is not repeated. Source: LightReasoner, arXiv 2510.07962, its efficiency and ablation tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from client.errors import LightReasonerError
from client.runs.build import build_run
from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.evaluate import BASE_MODEL, check, evaluate
from trainer.evaluation.records import Record, Records
from trainer.evaluation.scores import score
from trainer.evaluation.summary import markdown_table
from trainer.evaluation.variants import PAPER_VARIANTS, Variant
from trainer.interruption import run_training
from trainer.settings import OUTPUTS, Examination


@dataclass(frozen=True)
class Plan:
    """The settings that are the same for every row of a table."""

    model: ModelFolder
    out: Path
    benchmarks: Mapping[str, str]
    seeds: Sequence[int]
    examination: Examination
    train_options: Sequence[str]  # of `train`, as a user would write them
    is_trained: Callable[[list[str], ModelFolder], bool]  # whether `train` with these arguments has nothing left to do

    @property
    def records(self) -> Path:
        """The file with every output of all models."""
        return self.out / OUTPUTS


@dataclass(frozen=True)
class Cell:
    """A row's accuracy on a benchmark, over all its seeds."""

    accuracy: float
    interval: tuple[float, float]  # 95%, over problems
    deviation: float | None  # standard deviation of the accuracy between seeds; None: only one seed

    def __str__(self) -> str:
        low, high = self.interval
        spread = f" ± {self.deviation:.1%}" if self.deviation is not None else ""
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}]{spread}"


@dataclass(frozen=True)
class Row:
    """The results of one way of training, or of the untrained expert."""

    name: str
    facts: dict[str, Any]  # what it cost or is made of, by column
    cells: dict[str, Cell]  # by benchmark


def ablation(run_url: str, plan: Plan, console: Console, variants: Sequence[Variant] = PAPER_VARIANTS) -> list[Row]:
    """Rows for the base and the variants, whose RUNs are built from one RUN's trajectories."""
    source = Run(run_url)
    manifest = source.manifest()
    settings = [variant.of(manifest) for variant in variants]  # an invalid variant is an error before any training
    check(plan.model, plan.benchmarks, plan.examination, plan.records)
    names, facts = {}, {}
    for variant, asked in zip(variants, settings, strict=True):
        own = all(getattr(manifest, name) == value for name, value in asked)
        url = run_url if own else str(plan.out / "runs" / variant.folder)
        if not own:
            build_run(source, Run(url), asked)
        trained = [train_adapter(url, variant.name, seed, plan, console, folder=variant.folder) for seed in plan.seeds]
        names[variant.name] = [str(adapter) for adapter in trained]
        completion = Run(url).completion()
        shifts = completion and completion.totals.label_shifts
        facts[variant.name] = {
            "kept steps": provenance(trained[0])["kept_steps"],
            "label shift, nats": shifts.mean if shifts else None,
            "overturned": shifts.overturned_share if shifts else None,
        }
    return _rows(names, facts, plan, console)


def efficiency(run_url: str, solutions_url: str, answers: str, plan: Plan, console: Console) -> list[Row]:
    """Rows for the base, SFT on a RUN's correct solutions, and the contrast on another RUN, with the cost of each."""
    check(plan.model, plan.benchmarks, plan.examination, plan.records)
    names, facts = {}, {}
    for name, url, options in (
        ("SFT", solutions_url, ["--objective", "sft", "--answers", answers]),
        ("LightReasoner", run_url, []),
    ):
        trained = [train_adapter(url, name, seed, plan, console, options) for seed in plan.seeds]
        names[name] = [str(adapter) for adapter in trained]
        facts[name] = {
            "problems": Run(url).manifest().problems.count,
            "sampling, s": sampling_seconds(Run(url)),
            "training, s": float(np.mean([training_seconds(adapter) for adapter in trained])),
            "tuned tokens": provenance(trained[0])["kept_steps"],
        }
    return _rows(names, facts, plan, console)


def train_adapter(
    url: str, name: str, seed: int, plan: Plan, console: Console, options: Sequence[str] = (), folder: str | None = None
) -> Path:
    """Train an adapter, unless it is complete, and return its folder.

    Raises LightReasonerError with the training's error, or Interrupted if a signal stops the training: the same command
    then resumes from its checkpoint.
    """
    adapter = plan.out / "adapters" / f"{folder or name}-{seed}"
    words = [url, "--model", plan.model.hub_id or str(plan.model), "--output", str(adapter)]
    words += ["--seed", str(seed), "--resume", *options, *plan.train_options]
    complete = plan.is_trained(words, plan.model)
    console.print(f"{name}, seed {seed}: {adapter}{' is complete' if complete else ''}", soft_wrap=True)
    if not complete:
        status, complaint = run_training(words, f"{name}, seed {seed}")
        if status:
            said = complaint.strip().rpartition("error: ")[2] or f"exit status {status}"
            raise LightReasonerError(f"{name}, seed {seed}: {said}")
    about = provenance(adapter)
    if (about.get("held_out") or {}).get("past_the_best") and about["adapter_step"] != about["best_step"]:
        console.print(
            f"warning: {name}, seed {seed}: training went past its best, step {about['best_step']} of "
            f"{about['optimizer_steps']}; '-- --keep best' keeps that one",
            style="yellow",
            soft_wrap=True,
        )
    return adapter


def provenance(adapter: Path) -> dict[str, Any]:
    """lightreasoner.json of an adapter that was trained here."""
    return json.loads((adapter / "lightreasoner.json").read_text())


def training_seconds(adapter: Path) -> float:
    """Seconds that an adapter's optimizer steps took, without loading and writing."""
    lines = (adapter / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)


def sampling_seconds(run: Run) -> float | None:
    """Seconds from the creation of the RUN until it was sealed, pauses included; None if it is not sealed.

    For a RUN that was built from another one: the seconds of that one. Raises RunError if that one is gone.
    """
    if source := run.manifest().built_from:
        return sampling_seconds(Run(source))
    completion = run.completion()
    return completion.sealed_at - run.manifest().created_at if completion else None


def _rows(names: dict[str, list[str]], facts: dict[str, dict[str, Any]], plan: Plan, console: Console) -> list[Row]:
    plan.out.mkdir(parents=True, exist_ok=True)
    adapters = [adapter for of_one in names.values() for adapter in of_one]
    evaluate(plan.model, adapters, plan.benchmarks, plan.examination, console, plan.records)
    records = Records.read(plan.records)
    columns = next(iter(facts.values())).keys()
    rows = [Row("expert", dict.fromkeys(columns), _plan_cells([BASE_MODEL], records, plan))]
    return rows + [Row(name, facts[name], _plan_cells(mine, records, plan)) for name, mine in names.items()]


def _plan_cells(models: Sequence[str], records: Records, plan: Plan) -> dict[str, Cell]:
    return {name: cell([records.of(model, name) for model in models]) for name in plan.benchmarks}


def cell(records: Sequence[Sequence[Sequence[Record]]]) -> Cell:
    """records[seed][problem][sample] -> accuracy, its interval over problems, its deviation between seeds."""
    problems = [[record.correct for samples in seeds for record in samples] for seeds in zip(*records, strict=True)]
    counted = score(problems)
    by_seed = [np.mean([record.correct for samples in seed for record in samples]) for seed in records]
    return Cell(counted.accuracy, counted.interval, float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None)


def table_figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table as JSON."""
    return [{"name": row.name, **row.facts, "benchmarks": {k: vars(v) for k, v in row.cells.items()}} for row in rows]


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    """The table for the terminal."""
    header, *lines = _lines(rows)
    shown = Table(title=title)
    for column in header:
        shown.add_column(column, justify="left" if not column else "right")
    for line in lines:
        shown.add_row(*line)
    return shown


def table_markdown(rows: Sequence[Row], title: str) -> str:
    """The table as Markdown."""
    header, *lines = _lines(rows)
    note = "Accuracy, its 95% interval over problems, ± its standard deviation between seeds where there are several."
    return "\n".join([f"# {title}", "", *markdown_table(header, lines), "", note, ""])


def _fact_text(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "overturned" else f"{value:.3f}" if name.endswith("nats") else f"{value:,.0f}"


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    base = rows[0]
    header = ["", *base.facts, *(label for name in base.cells for label in (name, "gain"))]
    lines = [header]
    for row in rows:
        line = [row.name, *(_fact_text(name, value) for name, value in row.facts.items())]
        for name, found in row.cells.items():
            gain = f"{100 * (found.accuracy - base.cells[name].accuracy):+.1f}" if row is not base else ""
            line += [str(found), gain]
        lines.append(line)
    return lines
