"""The result of the demo in one line: accuracy before and after, and McNemar's p.

In: the folder that run.sh wrote, for its results.json. Out: a line like `before 55.4% → after 77.1% (p 7e-45)`.
It measures nothing itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def unseen(folder: Path) -> dict[str, Any]:
    """The result on the unseen problems: n, accuracy, interval, `before` and `paired`, as `evaluate` writes them."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results["benchmarks"]["unseen"]


def outcome(result: dict[str, Any]) -> str:
    """The line that `make demo` ends with."""
    p = result["paired"]["p"]
    return f"before {result['before']['accuracy']:.1%} → after {result['accuracy']:.1%} (p {p:.1g})".replace(
        "e-0", "e-"
    )


if __name__ == "__main__":
    print(outcome(unseen(Path(sys.argv[1]))))
