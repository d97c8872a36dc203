"""Checks on a GPU node that the service is exact and fast there, with one command; the result is tables and JSON.

    make gpu-check                                          # every part, on every pair; meant for 20 minutes of an H100
    python tests/gpu/check.py --pairs 7b --parts start,sampling
    make gpu-check DEVICE=cpu                               # the same program on the demo's pair, before there is a GPU

It needs the package with the extras `server` and `trainer`, and nvidia-smi. It makes its models itself. Nothing else
may use the GPUs meanwhile. Each part can run alone: it starts and samples what it needs. The results are printed as
they come, and written to gpu-check.json and gpu-check.md in --out.
It exits with 1 if a part fails or a claim does not hold. Speed targets are printed beside the figures; missing a target
is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ON_PATH = [str(ROOT), str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]
sys.path[:0] = ON_PATH
os.environ["PYTHONPATH"] = os.pathsep.join([*ON_PATH, *filter(None, [os.environ.get("PYTHONPATH")])])

from gpu.card import Card  # noqa: E402
from gpu.pairs import NAMES, pair  # noqa: E402
from gpu.parts import alone, eager, exactness, sampling, start, training  # noqa: E402
from gpu.session import Figures, Session, Sizes  # noqa: E402
from gpu.whole import end_to_end, stopping  # noqa: E402

PARTS: dict[str, Callable[[Session], Figures]] = {
    "start": start, "sampling": sampling, "exactness": exactness, "alone": alone, "training": training,
    "end": end_to_end, "eager": eager, "stopping": stopping,
}  # fmt: skip
"""The parts, in an order in which one server with default settings is enough for a pair."""
START_SECONDS = 900.0
"""Longest start of a server. The first start on a GPU compiles."""
DEFAULT_PAIRS = {"cuda": [name for name in NAMES if name != "tiny"], "cpu": ["demo"]}
ONCE, SHOWN_BY = ("eager", "stopping"), {"cuda": "0.5b", "cpu": "demo"}
"""Parts that run on one pair only: how a server ends does not depend on its models, and all amateurs are equal."""
SIZES = {"cuda": Sizes(problems=1000, tokens=128, compared=32), "cpu": Sizes(problems=64, tokens=32, compared=16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--pairs", help=f"of {','.join(NAMES)}, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--problems", type=int)
    parser.add_argument("--out", type=Path, default=Path("gpu-check-output"))
    asked = parser.parse_args()
    for given, known in ((asked.pairs or "", NAMES), (asked.parts, PARTS)):
        if unknown := {*filter(None, given.split(","))} - {*known}:
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    if asked.device == "cuda" and not shutil.which("nvidia-smi"):
        parser.error("nvidia-smi is not found, so there is no GPU; --device cpu tries this program without one")
    from support.servers import real_server

    real_server.START_SECONDS = START_SECONDS
    sizes = SIZES[asked.device]
    if asked.problems:
        sizes = Sizes(asked.problems, sizes.tokens, min(sizes.compared, asked.problems))
    pairs = asked.pairs.split(",") if asked.pairs else DEFAULT_PAIRS[asked.device]
    asked.out.mkdir(parents=True, exist_ok=True)
    found = check(Card(asked.device), pairs, asked.parts.split(","), sizes, asked.out)
    sys.exit(1 if any(part["failed"] for parts in found["pairs"].values() for part in parts.values()) else 0)


def check(card: Card, pairs: list[str], parts: list[str], sizes: Sizes, out: Path) -> dict[str, Any]:
    """Run the parts on the pairs. After each part, write all results so far to `out`."""
    found: dict[str, Any] = {"device": card.name, "sizes": vars(sizes), "pairs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in pairs:
            began = time.monotonic()
            with Session(pair(name, Path(folder), card.device), card, sizes, Path(folder, f"work-{name}")) as session:
                print(f"{name}: models made in {time.monotonic() - began:.0f} s", flush=True)
                for part in parts:
                    if part in ONCE and SHOWN_BY[card.device] in pairs and name != SHOWN_BY[card.device]:
                        continue
                    found["pairs"].setdefault(name, {})[part] = run(PARTS[part], session)
                    print(table(name, part, found["pairs"][name][part]), flush=True)
                    (out / "gpu-check.json").write_text(json.dumps(found, indent=1))
                    (out / "gpu-check.md").write_text(markdown(found))
    return found


def run(part: Callable[[Session], Figures], session: Session) -> dict[str, Any]:
    """Run a part. Returns its figures and its failures; an error in one part does not stop the others."""
    began = time.monotonic()
    try:
        found = part(session)
        rows, failed = found.rows, found.failed
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        traceback.print_exc()
        rows, failed = [], [f"{type(error).__name__}: {error}"[:2000]]
    return {"rows": rows, "failed": failed, "seconds": round(time.monotonic() - began, 1)}


def table(pair_name: str, part: str, found: dict[str, Any]) -> str:
    lines = [f"\n### {pair_name}: {part}, in {found['seconds']} s\n", "| | | target |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value} | {target} |" for name, value, target in found["rows"]]
    lines += [f"\n**Failed:** {said}" for said in found["failed"]]
    return "\n".join(lines)


def markdown(found: dict[str, Any]) -> str:
    size = found["sizes"]
    lines = [f"# {found['device']}: {size['problems']} problems x {size['tokens']} tokens"]
    for name, parts in found["pairs"].items():
        lines += [table(name, part, figures) for part, figures in parts.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
