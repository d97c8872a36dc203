"""Compares labels on the demo's pair: accuracy by length of training, and how well held-out scores predict it.

One RUN of the demo's pair gives a RUN for each variant of selection and labels. Each of these trains one adapter per
seed, whose checkpoints are evaluated on the development problems. With --test, the epochs that were best there are
evaluated on the test problems. --second-round merges the adapter of six epochs into the expert, samples the same
problems again and trains again: once with the same amateur, once with the previous expert as amateur. Every phase is a
command of the project. A second call resumes where the first stopped, also with more epochs. --report only prints the
tables of all results so far.

    .venv/bin/python tests/benchmarks/labels.py FOLDER RUN [--epochs 24] [--save-steps 180] [--seeds 0,1,2]
        [--variants "contrast,tilt 0.5"] [--problems 500] [--test] [--second-round]

RUN is the one that `make demo` leaves in demo-output/run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo"
VARIANTS = {
    "contrast": [],
    "tilt 0.5": ["--labels", "tilt", "--gamma", "0.5"],
    "max-shift 0.1": ["--max-shift", "0.1"],
    "top 0.05": ["--select", "top", "--keep", "0.05"],
    "tilt 1": ["--labels", "tilt", "--gamma", "1"],
    "tilt 0.25": ["--labels", "tilt", "--gamma", "0.25"],
    "max-shift 0.3": ["--max-shift", "0.3"],
    "top 0.02": ["--select", "top", "--keep", "0.02"],
}
"""Options of `build`, by name. contrast is the paper's label."""
TABLE = (3, 6, 12, 24)
"""Epochs in the table."""
STEPS = 60
"""Optimizer steps an epoch: 950 trajectories that are not held out, 16 a step. `top`, which keeps steps of fewer
trajectories, takes as many steps as the others, and so more epochs."""
TABLE_STEPS = [epochs * STEPS for epochs in TABLE]
FIRST_ROUND, SECOND_ROUND = 6 * STEPS, (2 * STEPS, 6 * STEPS)
"""Optimizer steps of the adapter to merge; of the adapters to evaluate after a second round."""
AMATEURS = {"fixed": DEMO / "amateur", "moving": DEMO / "expert"}
"""The amateur of a second round: that of the first, or the expert of the first."""
SAMPLED = 1000
"""Problems to sample in a second round: those of the demo."""
EXAMINED = ["--system-prompt", "Please reason step by step.", "--max-tokens", "64"]
SCORES = ("loss", "agreement", "distance", "other_shift", "loss + other_shift", "score")
"""Held-out figures, and sums of them, by which a checkpoint can be chosen. `train --keep best` uses the last."""
TOGETHER = 4
"""Trainings that one engine evaluates."""

Point = Mapping[str, Any]
"""The figures of one model by `evaluate`: accuracy, interval, paired."""


def command(package: str, *words: object) -> None:
    """Run a command of the project. Exits with its error if it fails."""
    from support.processes import forked

    print(f"$ {package} {' '.join(map(str, words))}", flush=True)
    done = forked.run(package, *words, timeout=24 * 3600)
    if done.returncode:
        raise SystemExit(done.stderr)


@dataclass(frozen=True)
class Trained:
    """One variant with one seed: its files in FOLDER."""

    folder: Path
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.replace(' ', '-')}-{self.seed}"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapters" / self.name

    @property
    def about(self) -> dict[str, Any]:
        """lightreasoner.json of the adapter; empty if the training has not ended."""
        file = self.adapter / "lightreasoner.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints and the best adapter, by optimizer step. Copies the best: longer training may replace it."""
        folders = (self.adapter / "checkpoints").glob("checkpoint-*")
        found = {int(folder.name.rpartition("-")[2]): folder for folder in folders}
        best = self.about["best_step"]
        if best not in found:
            found[best] = self.folder / "best" / f"{self.name}-{best}"
            if not found[best].exists():
                shutil.copytree(self.adapter, found[best], ignore=shutil.ignore_patterns("checkpoints", ".*"))
        return dict(sorted(found.items()))

    def curve(self, results: Mapping[str, Point]) -> dict[int, Point]:
        """The results of its checkpoints, by optimizer step."""
        return {step: results[str(at)] for step, at in self.checkpoints().items() if str(at) in results}

    def held_out(self, score: str, step: float) -> float:
        """A held-out score at a step, interpolated linearly between measurements; lower is better."""
        lines = [json.loads(line) for line in (self.adapter / "held_out.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        sign = -1.0 if score == "agreement" else 1.0
        named = ([line.get(name, np.nan) for line in lines] for name in score.split(" + "))
        return sign * sum(float(np.interp(step, steps, values)) for values in named)


def train(trained: Trained, run: str, epochs: int, save_steps: int) -> None:
    """Build the RUN of a variant and train on it, if that is not done."""
    url = run
    if options := VARIANTS[trained.variant]:
        url = str(trained.folder / "runs" / trained.variant.replace(" ", "-"))
        if not Path(url, "complete.json").exists():
            command("client", "build", run, url, *options)
    if trained.about.get("optimizer_steps", 0) < epochs * STEPS:
        about = ["--max-steps", epochs * STEPS, "--seed", trained.seed, "--keep", "best", "--resume"]
        kept = ["--save-steps", save_steps, "--keep-checkpoints", epochs * STEPS // save_steps + 1]
        command("trainer", "train", url, "--model", DEMO / "expert", "--output", trained.adapter, *about, *kept)


def written_problems(folder: Path, split: str, problems: int) -> Path:
    """A file with problems of a split."""
    made = subprocess.run(
        [sys.executable, DEMO / "word_problems.py", split, str(problems)], check=True, capture_output=True, text=True
    )
    file = folder / f"{split}-problems.jsonl"
    file.write_text(made.stdout)
    return file


def evaluate(
    folder: Path, split: str, adapters: Iterable[Path], problems: int, model: Path = DEMO / "expert", to: str = ""
) -> None:
    """Evaluate a model and its adapters on a split. Outputs of an earlier evaluation are not generated again."""
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    file = written_problems(folder, split, problems)
    asked = ["--benchmark", f"{split}={file}", "-o", folder / f"{to or split}.json", *EXAMINED]
    command("trainer", "evaluate", model, *words, *asked)


def second_round(first: Trained, amateur: str, problems: int) -> None:
    """Merge the adapter of a first round, then sample, train and evaluate again. Skips what is done already."""
    rounds = first.folder / "second-round"
    merged, here = rounds / first.name, rounds / f"{first.name}-{amateur}"
    rounds.mkdir(exist_ok=True)
    if not (merged / "config.json").exists():
        command("trainer", "merge", DEMO / "expert", first.checkpoints()[FIRST_ROUND], merged)
    run, adapter = here / "run", here / "adapter"
    if not (run / "complete.json").exists():
        models = ["--expert", merged, "--amateur", AMATEURS[amateur], "--config", DEMO / "server.yaml"]
        settings = ["--max-tokens", "64", "--top-k", "32", *VARIANTS[first.variant]]
        words = ["sample", written_problems(rounds, "sample", SAMPLED), run, *models, *settings]
        subprocess.run([sys.executable, "-m", "server", *map(str, words)], check=True, cwd=ROOT)
    if not (adapter / "adapter_model.safetensors").exists():
        steps = ["--max-steps", SECOND_ROUND[-1], "--save-steps", SECOND_ROUND[0], "--keep-checkpoints", 9]
        command(
            "trainer", "train", run, "--model", merged, "--output", adapter, "--seed", first.seed, "--resume", *steps
        )
    adapters = [adapter / "checkpoints" / f"checkpoint-{steps}" for steps in SECOND_ROUND]
    evaluate(rounds, "dev", adapters, problems, merged, here.name)


def results_of(folder: Path, split: str, file_name: str = "") -> dict[str, Point]:
    """The results on a split, by adapter; empty if there are none."""
    file = folder / f"{file_name or split}.json"
    models = json.loads(file.read_text())["models"] if file.exists() else {}
    return {name: by_benchmark[split] for name, by_benchmark in models.items()}


def chosen_epochs(every: Sequence[Trained], results: Mapping[str, Point]) -> dict[str, int]:
    """For each variant, the epochs of the table with the highest mean accuracy over its seeds."""
    chosen = {}
    for variant in VARIANTS:
        curves = [curve for one in every if one.variant == variant and (curve := one.curve(results))]
        means = {
            epochs: np.mean([curve[epochs * STEPS]["accuracy"] for curve in curves])
            for epochs in TABLE
            if curves and all(epochs * STEPS in curve for curve in curves)
        }
        if means:
            chosen[variant] = max(means, key=lambda epochs: means[epochs])
    return chosen


def cell(point: Point) -> str:
    """An accuracy as the tables show it."""
    low, high = point["interval"]
    pair = point.get("paired")
    return f"{point['accuracy']:.1%} [{low:.1%}, {high:.1%}]" + (f" +{pair['fixed']} −{pair['broken']}" if pair else "")


def by_variant(curves: Mapping[Trained, dict[int, Point]]) -> dict[str, list[dict[int, Point]]]:
    """The curves of each variant's seeds."""
    found: dict[str, list[dict[int, Point]]] = {}
    for one, curve in curves.items():
        found.setdefault(one.variant, []).append(curve)
    return found


def means(seeds: Sequence[Mapping[int, Point]], step: int) -> str:
    """The mean accuracy of several seeds at a step, and each seed's; '' if it was not measured."""
    found = [100 * curve[step]["accuracy"] for curve in seeds if step in curve]
    return f"{np.mean(found):.1f}%: {', '.join(f'{value:.1f}' for value in found)}" if found else ""


def report(every: Sequence[Trained], folder: Path) -> None:
    """Print the tables of all results so far, and write curves.json."""
    results = results_of(folder, "dev")
    curves = {one: curve for one in every if (curve := one.curve(results))}
    print("development problems:", cell(results["base"]), "before")
    print(f"\naccuracy, the mean over the seeds and each seed, by epochs\n| | {' | '.join(map(str, TABLE))} |")
    for variant, seeds in by_variant(curves).items():
        print(f"| {variant} | {' | '.join(means(seeds, step) for step in TABLE_STEPS)} |")
    print(f"\nwith 95% intervals, fixed and broken\n| | seed | {' | '.join(map(str, TABLE))} |")
    for one, curve in curves.items():
        cells = [cell(curve[step]) if step in curve else "" for step in TABLE_STEPS]
        print(f"| {one.variant} | {one.seed} | {' | '.join(cells)} |")
    print("\nrank correlation of accuracy with each held-out score, over the checkpoints of a training: -1 is perfect")
    print(f"| | | {' | '.join(SCORES)} |")
    for one, curve in curves.items():
        accuracies = [point["accuracy"] for point in curve.values()]
        found = [spearmanr([one.held_out(score, step) for step in curve], accuracies).statistic for score in SCORES]
        print(f"| {one.variant} | {one.seed} | {' | '.join(f'{value:+.2f}' for value in found)} |")
    print(
        "\naccuracy of the checkpoint that each score chooses, of --keep best, of the best and of the last; the steps"
    )
    print(f"| | | {' | '.join([*SCORES, '--keep best', 'best', 'last'])} |")
    for one, curve in curves.items():
        chosen = [min(curve, key=lambda step: one.held_out(score, step)) for score in SCORES]
        chosen += [one.about["best_step"], max(curve, key=lambda step: curve[step]["accuracy"]), max(curve)]
        cells = [f"{curve[step]['accuracy']:.1%} ({step})" if step in curve else f"({step})" for step in chosen]
        print(f"| {one.variant} | {one.seed} | {' | '.join(cells)} |")
    drawn: dict[str, dict[int, list[float]]] = {}
    for variant, seeds in by_variant(curves).items():
        shared = set.intersection(*map(set, seeds))  # the checkpoints of all seeds; the best steps differ
        drawn[variant] = {0: [results["base"]["accuracy"]]}
        drawn[variant] |= {step: [curve[step]["accuracy"] for curve in seeds] for step in sorted(shared)}
    (folder / "curves.json").write_text(json.dumps(drawn))  # for deploy/demo/pictures.py
    print("\nsecond round, development problems; fixed and broken are counted from the first round's adapter")
    for one in every:
        for amateur in AMATEURS:
            name = f"{one.name}-{amateur}"
            if again := results_of(folder / "second-round", "dev", name):
                cells = [cell(point) for point in again.values()]
                print(f"| {one.variant} | {one.seed} | {amateur} | {' | '.join(cells)} |")
    if tested := results_of(folder, "test"):
        print("\ntest problems:", cell(tested["base"]), "before")
        for name, point in tested.items():
            print(f"| {name.removeprefix(str(folder))} | {cell(point)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--epochs", type=int, default=max(TABLE), help="epochs of each training")
    parser.add_argument("--save-steps", type=int, default=3 * STEPS, help="optimizer steps between two checkpoints")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--problems", type=int, default=500, help="problems of each split")
    parser.add_argument("--test", action="store_true", help="then evaluate what is best on the test split, once")
    parser.add_argument("--second-round", action="store_true", help="then a second round with either amateur")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    folder, variants = given.folder.resolve(), given.variants.split(",")
    every = [Trained(folder, variant, int(seed)) for seed in given.seeds.split(",") for variant in variants]
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, 0 if given.report else len(every), TOGETHER):
        for one in every[first : first + TOGETHER]:
            train(one, given.run, given.epochs, given.save_steps)
        done = [one for one in every if one.about]
        evaluate(folder, "dev", [at for one in done for at in one.checkpoints().values()], given.problems)
    done = [one for one in every if one.about]
    if given.test:
        best = chosen_epochs(done, results_of(folder, "dev"))
        adapters = [one.checkpoints()[best[one.variant] * STEPS] for one in done]
        evaluate(folder, "test", adapters, given.problems)
    if given.second_round:
        for one in done:
            for amateur in AMATEURS:
                second_round(one, amateur, given.problems)
    report(done, folder)


if __name__ == "__main__":
    main()
