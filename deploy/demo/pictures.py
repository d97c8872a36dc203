"""Makes the pictures of README.md beside this file: result.png and report.png of a demo, or labels.png.

In: the folder that run.sh wrote (default demo-output), or the folder of tests/benchmarks/labels.py. Out: the accuracies
before and after with their 95% intervals, and the report as a browser shows it; or accuracy by optimizer step for each
kind of label. It needs matplotlib, playwright and a `chromium` on the PATH, and measures nothing itself.

    .venv/bin/python deploy/demo/pictures.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from outcome import outcome, unseen
from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
INK, BEFORE, AFTER = "#1f2328", "#9aa4b2", "#2f6fde"
FAMILIES = {"contrast": "#1f2328", "tilt": "#2f6fde", "max-shift": "#c2570c", "top": "#2e8540"}
"""Colours by the first word of a variant. Variants of one family differ by their dashes."""
DASHES = ("-", "--", ":")
COLOURS = 128
"""Colours in the screenshot: enough for text and flat bars, at a third of the file's size."""
PIXELS = {"width": 1120, "height": 900}
"""Size of the browser's window: shows what a reader sees first, legible at half a page's width."""


def draw_result(result: dict[str, Any], file: Path) -> None:
    """Draw two bars with 95% intervals. `result`: as `evaluate` writes it."""
    bars = [("the expert\nas it is", result["before"], BEFORE), ("with the\nadapter", result, AFTER)]
    figure, axes = plt.subplots(figsize=(5.2, 4.5), dpi=150, layout="constrained")
    for place, (_, bar, colour) in enumerate(bars):
        accuracy, (low, high) = bar["accuracy"], bar["interval"]
        axes.bar(place, 100 * accuracy, width=0.56, color=colour)
        axes.errorbar(
            place, 100 * accuracy, [[100 * (accuracy - low)], [100 * (high - accuracy)]], color=INK, capsize=6, lw=1.6
        )
        axes.text(place, 100 * accuracy / 2, f"{accuracy:.1%}", ha="center", va="center", size=19, color="white")
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], size=13, color=INK)
    axes.set_xlim(-0.55, 1.55)
    axes.set_ylim(0, 100)
    axes.set_ylabel(f"solved of {result['n']:,} unseen problems, %", size=12, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_title(f"{outcome(result)}\n95% intervals", size=13, color=INK)
    figure.savefig(file)
    plt.close(figure)


def draw_labels(curves: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Draw a line for each variant, the mean over its seeds. `curves[variant][step]`: the accuracy of each seed."""
    figure, axes = plt.subplots(figsize=(8, 4.6), dpi=120, layout="constrained")
    for variant, points in curves.items():
        family = variant.split()[0]
        dash = DASHES[[name for name in curves if name.split()[0] == family].index(variant)]
        steps, means = [int(step) for step in points], [100 * sum(seeds) / len(seeds) for seeds in points.values()]
        axes.plot(steps, means, dash, color=FAMILIES[family], marker=".", label=variant)
    axes.set_ylim(0, 100)
    axes.set_xlabel("optimizer step (60 an epoch)", size=12, color=INK)
    axes.set_ylabel("solved of the development problems, %", size=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file)
    plt.close(figure)


def photograph_report(page: Path, file: Path) -> None:
    """Save a picture of the top of the report, in its light theme."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no chromium on the PATH: apt-get install chromium")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        window = browser.new_page(viewport=PIXELS, color_scheme="light")
        window.goto(page.resolve().as_uri())
        window.screenshot(path=file)
        browser.close()
    Image.open(file).quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    if (folder / "curves.json").exists():
        draw_labels(json.loads((folder / "curves.json").read_text()), HERE / "labels.png")
    else:
        draw_result(unseen(folder), HERE / "result.png")
        photograph_report(folder / "report.html", HERE / "report.png")
