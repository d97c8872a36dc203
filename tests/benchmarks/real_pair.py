"""A published pair, from problems to accuracies: what a real model gains, with the time and memory of each phase.

Qwen2.5-Coder-1.5B-Instruct learns from its contrast with Qwen2.5-Coder-0.5B-Instruct on GSM8K's training problems.
Accuracy before and after is measured on problems of GSM8K's test set and of SVAMP. Every phase is a command of the
project, which resumes after a stop: repeat the same command to resume, or, when all is done, to print the tables. It
takes hours on two cores, 5 GB of files, 8 GB of memory.

    .venv/bin/python tests/benchmarks/real_pair.py FOLDER [--data DATA] [--until sample|train|evaluate] [--report]

DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl and svamp.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PHASES = ("models", "sample", "train", "evaluate")
PROBLEMS, EXAMINED = 240, 300
"""Training problems to sample; problems of each benchmark. All are drawn at random with one seed."""
BENCHMARKS = {"gsm8k": "gsm8k_test.jsonl", "svamp": "svamp.jsonl"}
LABELS = {"contrast": [], "tilt": ["--labels", "tilt", "--gamma", "0.5"]}
"""Options of `build`: the paper's label, and the label that tolerates more training on the demo's pair (labels.py)."""
KEPT_STEPS = 16
"""Kept steps an optimizer step, as published."""
EPOCHS = 1
OUTPUT_TOKENS = 400
SERVER = """
expert: {dtype: bfloat16, max_model_len: 1024, kv_cache_memory_bytes: 2147483648}
amateur: {dtype: bfloat16, max_model_len: 1024, kv_cache_memory_bytes: 1073741824}
"""


def memory(root: psutil.Process) -> int:
    """Bytes that a process and its descendants hold. Pages that several share count once."""
    held = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            held += process.memory_full_info().pss
    return held


@contextmanager
def measured(folder: Path, phase: str) -> Iterator[None]:
    """Add a line to phases.jsonl: seconds, and the most memory that this process's children held."""
    here, ended, most = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not ended.wait(5):
            most = max(most, memory(here))

    watcher = threading.Thread(target=watch)
    began = time.monotonic()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        line = {"phase": phase, "seconds": round(time.monotonic() - began, 1), "bytes": most}
        with (folder / "phases.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def command(package: str, *words: object) -> None:
    """Run a command of the project. If it fails, this program exits with its status."""
    print(f"$ {package} {' '.join(map(str, words))}", flush=True)
    if status := subprocess.run([sys.executable, "-m", package, *map(str, words)], cwd=ROOT).returncode:
        sys.exit(status)


def drawn(data: Path, name: str, count: int, to: Path) -> Path:
    """A file with `count` of a data set's problems."""
    if not to.exists():
        lines = (data / name).read_text().splitlines(keepends=True)
        to.write_text("".join(random.Random(0).sample(lines, count)))
    return to


def kept_steps(run: Path) -> float:
    """Kept steps per trajectory, on average."""
    complete = json.loads((run / "complete.json").read_text())
    return complete["kept"] / complete["trajectories"]


def sample(folder: Path, data: Path, models: tuple[Path, Path]) -> None:
    problems = drawn(data, "gsm8k_train.jsonl", PROBLEMS, folder / "problems.jsonl")
    configuration = folder / "server.yaml"
    configuration.write_text(SERVER)
    pair = ["--expert", models[0], "--amateur", models[1], "--config", configuration]
    command("server", "sample", problems, folder / "runs" / "contrast", *pair)


def train(folder: Path, expert: Path) -> None:
    run = folder / "runs" / "contrast"
    batch = max(1, round(KEPT_STEPS / kept_steps(run)))
    for label, options in LABELS.items():
        output = folder / "adapters" / label
        built = folder / "runs" / label
        if options and not (built / "complete.json").exists():
            command("client", "build", run, built, *options)
        if (output / "adapter_model.safetensors").exists():
            continue
        settings = ["--dtype", "bfloat16", "--epochs", EPOCHS, "--batch-size", batch, "--keep", "best", "--resume"]
        with measured(folder, f"train, {label}"):
            command("trainer", "train", built, "--model", expert, "--output", output, *settings)


def evaluate(folder: Path, data: Path, expert: Path) -> None:
    words: list[object] = []
    for name, file in BENCHMARKS.items():
        words += ["--benchmark", f"{name}={drawn(data, file, EXAMINED, folder / file)}"]
    for label in LABELS:
        words += ["--adapter", folder / "adapters" / label]
    settings = ["--dtype", "bfloat16", "--max-tokens", OUTPUT_TOKENS, "-o", folder / "results.json"]
    command("trainer", "evaluate", expert, *words, *settings)


def report(folder: Path) -> None:
    """Print the tables of all results so far."""
    phases = [json.loads(line) for line in (folder / "phases.jsonl").read_text().splitlines()]
    print("\n| phase | minutes | memory, GB |\n| --- | --- | --- |")
    for phase in dict.fromkeys(line["phase"] for line in phases):
        of_it = [line for line in phases if line["phase"] == phase]
        seconds, most = sum(line["seconds"] for line in of_it), max(line["bytes"] for line in of_it)
        print(f"| {phase} | {seconds / 60:.1f} | {most / 1e9:.1f} |")
    results = folder / "results.json"
    if not results.exists():
        return
    print(f"\n| | {' | '.join(BENCHMARKS)} |\n| --- |{' --- |' * len(BENCHMARKS)}")
    for name, by_benchmark in json.loads(results.read_text())["models"].items():
        cells = []
        for benchmark in BENCHMARKS:
            result = by_benchmark[benchmark]
            (low, high), pair = result["interval"], result.get("paired")
            cells.append(f"{result['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
            if pair:
                cells[-1] += f", {pair['fixed']} fixed, {pair['broken']} broken, p {pair['p']:.2g}"
        print(f"| {Path(name).name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the three files")
    parser.add_argument("--until", choices=PHASES, default=PHASES[-1], help="end after this phase")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests")]
    from support.models.qwen_coder import make_pair

    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = () if given.report else PHASES[: PHASES.index(given.until) + 1]
    if wanted:
        models = make_pair(folder / "models")
    if "sample" in wanted and not (folder / "runs" / "contrast" / "complete.json").exists():
        with measured(folder, "sample"):
            sample(folder, given.data, models)
    if "train" in wanted:
        train(folder, models[0])
    if "evaluate" in wanted and not (folder / "results.json").exists():
        with measured(folder, "evaluate"):
            evaluate(folder, given.data, models[0])
    report(folder)


if __name__ == "__main__":
    main()
