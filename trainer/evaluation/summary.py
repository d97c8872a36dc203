"""The results of an evaluation as a table for the terminal, as Markdown, and as JSON.

In: comparisons. Out: text. Model output is only quoted: in Markdown it is in code blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from trainer.evaluation.records import Record
from trainer.evaluation.scores import Comparison, ModelResult

QUOTED_CHARACTERS = 600
"""Characters that an example quotes at most: the beginning of a question, and the end of an output, with its answer."""


def figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The results as JSON: the last model's figures by benchmark, and the figures of every model by benchmark."""
    models: dict[str, dict[str, Any]] = {}
    for comparison in comparisons:
        for result in comparison.results:
            models.setdefault(result.model, {})[comparison.benchmark] = result.to_json()
    return {"benchmarks": {comparison.benchmark: comparison.to_json() for comparison in comparisons}, "models": models}


def table(comparisons: Sequence[Comparison]) -> Table:
    """The results as a table for the terminal."""
    header, rows = _cells(comparisons)
    shown = Table(title="accuracy (pass@1), 95% intervals")
    for column in header:
        shown.add_column(column, justify="left" if column in ("benchmark", "model") else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The results as a Markdown table, with examples of problems that each model fixed and broke."""
    header, rows = _cells(comparisons)
    lines = ["# Evaluation", "", "Accuracy is pass@1, with its 95% interval.", ""]
    lines += [*markdown_table(header, rows), ""]
    for comparison in comparisons:
        for result in comparison.results:
            for kind, pairs in (("fixed", result.fixed), ("broken", result.broken)):
                for before, after in pairs:
                    lines += _example(comparison.benchmark, result.model, kind, before, after)
    return "\n".join(lines) + "\n"


def _cells(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    results = [result for comparison in comparisons for result in comparison.results]
    header = ["benchmark", "model", "n", "accuracy"]
    ks = sorted({k for result in results for k in result.score.pass_at if k > 1})
    header += [f"pass@{k}" for k in ks]
    if compared := any(result.paired for result in results):
        header += ["fixed", "broken", "McNemar's p"]
    rows = []
    for comparison in comparisons:
        for result in comparison.results:
            row = [comparison.benchmark, result.model, str(result.score.n), str(result.score)]
            row += [f"{result.score.pass_at[k]:.1%}" for k in ks]
            rows.append(row + (_paired(result) if compared else []))
    return header, rows


def _paired(result: ModelResult) -> list[str]:
    pair = result.paired
    return [str(pair.fixed), str(pair.broken), f"{pair.p:.2g}"] if pair else ["", "", ""]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. Cells may hold any text."""
    shown = [[_plain(cell) for cell in row] for row in (header, *rows)]
    shown.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(row)} |" for row in shown]


def _plain(text: str) -> str:
    """The text in one line, escaped so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _example(benchmark: str, model: str, kind: str, before: Record, after: Record) -> list[str]:
    return [
        f"## {kind} by {_plain(model)}: {_plain(benchmark)}, problem {_plain(before.problem_id)}",
        "",
        *_quoted(before.prompt[:QUOTED_CHARACTERS]),
        f"Gold answer `{_inline(before.gold)}`. Before, `{_inline(before.extracted)}`:",
        "",
        *_quoted(before.output[-QUOTED_CHARACTERS:]),
        f"After, `{_inline(after.extracted)}`:",
        "",
        *_quoted(after.output[-QUOTED_CHARACTERS:]),
    ]


def _quoted(text: str) -> list[str]:
    """A code block of indented lines, which no text in it can end."""
    return [*(f"    {line}" for line in text.splitlines() or [""]), ""]


def _inline(text: str) -> str:
    return " ".join(text.replace("`", "'").split()) or "nothing"
