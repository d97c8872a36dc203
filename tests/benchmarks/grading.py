"""How outputs are judged: our grader against plain math-verify, by benchmark, in one run.

Both judge: gold solutions as outputs; gold answers in ten forms without a box, all right; ten wrong forms around gold
answers, none of which may pass; with --cases, outputs with known verdicts (benchmark, gold, output, expected: a JSON
object a line). It prints counts and outputs a second, and the longest time that ours takes for a hostile output.
Benchmarks are named by their published files: gsm8k_test.jsonl, svamp.jsonl, asdiv.jsonl, minerva_math.jsonl,
olympiadbench.jsonl, mmlu_stem.jsonl, math_test.jsonl.

    .venv/bin/python tests/benchmarks/grading.py FOLDER [--golds 50] [--cases FILE.jsonl] [--hostile 500] [--show]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from math_verify import parse, verify  # noqa: E402

from client.problems.reader import ProblemRow, read_problems  # noqa: E402
from trainer.grading.gold import LETTERS, Gold, Kind, gold_answer  # noqa: E402
from trainer.grading.grader import grade  # noqa: E402

FILES = ("gsm8k_test", "math_test", "svamp", "asdiv", "minerva_math", "olympiadbench", "mmlu_stem")
WORKING = "First we look at what is given, and find 7919 by the way.\n\n"
RIGHT = (
    "Therefore, we get {maths}.",
    "Dividing both sides, we get\n\n\\[\n{plain}\n\\]",
    "The answer is {maths}.",
    "#### {plain}",
    "<answer>{plain}</answer>",
    "**Answer: {maths}**",
    "**Final Answer**\n\n{maths}",
    "So the final answer is:\n$$\n{plain}\n$$",
    "The final answer is {maths}. I hope it is correct.",
    "所以答案是 {maths}。",
)
WRONG = (
    "Therefore, we get {half}.",
    "The answer is $x \\ge {bare}$.",
    "Therefore, we get {power}.",
    "The answer is not {maths}.",
    "So it is between {maths} and $7919$.",
    "Therefore, the values are {maths} and $7919$.",
    "Hence it is more than {maths}.",
    "\\[\n|x| - 7919 = {bare}\n\\]",
    "The answer is {maths}. No, the answer is $7919$.",
    "So the answer is $-7919 + \\sqrt{{{bare}}}$.",
)
WRONG_CHOICE = (
    "The answer is not ({right}).",
    "Option {right} is wrong.",
    "The answer is ({wrong}). I excluded {right}.",
    "It is ({right}) or ({wrong}).",
    "({right}) is incorrect, so ({wrong}) is correct.",
    "The answer is {right} and {wrong}.",
    "First I thought that it is {right}.\n\n**Answer: {wrong}**",
    "It cannot be {right}.",
    "\\boxed{{{wrong}}}",
    "Neither {right} nor {wrong}.",
)
HOSTILE = (
    *string.printable,
    *(
        r"\frac{",
        r"\sqrt{",
        r"\boxed{",
        r"\text{",
        "^{",
        "^{99999999}",
        "9^{9^{9}}",
        "!",
        "(10^9)!",
        r"\binom{10^9}{5}",
    ),
    *(r"\int_0^1 e^{-x^3}", r"\sum_{n=1}^{10^{12}}", r"\infty", r"\cup", r"\pm", r"\%", "10^{99}", "e9", "½", "😀"),
    *("The answer is ", "#### ", "<answer>", "is ", " and ", "$", r"\[", r"\]", "(1,", "x", "=", "<", "}", "}", "\0"),
    "2^{-99999999}",
)


def by_math_verify(gold: Gold, output: str) -> bool:
    return bool(verify(parse(f"\\boxed{{{gold.text.strip('$')}}}"), parse(output)))


def forms(gold: Gold, templates: Sequence[str]) -> list[str]:
    """The gold answer in the form of each template."""
    bare = gold.text.strip().strip("$") if gold.text.count("$") <= 2 else gold.text.replace("$", "")
    words = gold.kind in (Kind.WORDS, Kind.CLOCK, Kind.CHOICE)
    wrong = next(letter for letter in LETTERS if letter != gold.text)
    filled = {
        "maths": bare if words else f"${bare}$",
        "plain": bare,
        "bare": f"({bare})" if re.search(r"[-+=]", bare) else bare,
        "half": f"half of {bare}" if words else rf"$\frac{{{bare}}}{{2}} + 7919$",
        "power": f"no {bare}" if words else f"$({bare})^7 + 7919$",
        "right": gold.text,
        "wrong": wrong,
    }
    return [WORKING + template.format(**filled) for template in templates]


def solution_of(row: dict[str, Any]) -> str:
    """The worked answer in a row; '' if it has none."""
    text = row.get("solution") or row.get("answer") or ""
    return "\n".join(text) if isinstance(text, list) else re.sub(r"<<[^>]*>>", "", text) if "\n" in str(text) else ""


def count(judge: Callable[[Gold, str], bool], golds: Sequence[Gold], outputs: Sequence[Sequence[str]]) -> int:
    return sum(judge(gold, output) for gold, several in zip(golds, outputs, strict=True) for output in several)


def ours(gold: Gold, output: str) -> bool:
    return grade(gold, output).correct


def show(golds: Sequence[Gold], outputs: Sequence[Sequence[str]], expected: bool) -> None:
    """Print the outputs that our grader judges wrongly."""
    for gold, several in zip(golds, outputs, strict=True):
        for output in several:
            if (verdict := grade(gold, output)).correct != expected:
                print(f"    {gold.text!r} {gold.unit!r}, {verdict}: {output[-120:]!r}")


def hostile(number: int) -> tuple[float, str]:
    """Grade `number` random outputs against changing golds. Returns the longest time in seconds, and its output."""
    rng, slowest = random.Random(7), (0.0, "")
    golds = [
        Gold("18"), Gold("9", unit="inches"), Gold("3.3e12", relative=0.01, unit="m/s"),
        Gold("(1,1), (3,2)", Kind.TUPLE), Gold(r"[\frac{1}{2}, 8]", Kind.INTERVAL), Gold("x^2-2x+1"),
        Gold("B", Kind.CHOICE, choices=("a", "b", "2")),
        Gold("Mrs. Hilt", Kind.WORDS), Gold("2^{-99999999}", absolute=0.1),
    ]  # fmt: skip
    for index in range(number):
        text = "".join(rng.choice(HOSTILE) for _ in range(rng.randrange(1, 60 if index % 5 else 3000)))
        output = (text, rf"\boxed{{{text}}}", f"The answer is {text}")[index % 3]
        began = time.perf_counter()
        grade(golds[index % len(golds)], output)
        slowest = max(slowest, (time.perf_counter() - began, output))
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--golds", type=int, default=50, help="of each benchmark, drawn")
    parser.add_argument("--cases", type=Path, help="outputs with their verdicts")
    parser.add_argument("--hostile", type=int, default=500)
    parser.add_argument("--show", action="store_true", help="print what is judged wrongly")
    arguments = parser.parse_args()
    print("| | solutions, right | boxless, right | wrong forms passed | outputs/s |\n| --- | --- | --- | --- | --- |")
    for name in FILES:
        if not (file := arguments.folder / f"{name}.jsonl").exists():
            continue
        rows = read_problems(str(file))
        rows = random.Random(0).sample(rows, min(arguments.golds, len(rows)))
        golds = [gold_answer(row) for row in rows]
        right = [forms(gold, RIGHT) for gold in golds]
        wrong = [forms(gold, WRONG_CHOICE if gold.kind is Kind.CHOICE else WRONG) for gold in golds]
        solutions = [[text] if (text := solution_of(row.row)) else [] for row in rows]
        for judge in (ours, by_math_verify):
            began = time.perf_counter()
            counts = [count(judge, golds, outputs) for outputs in (solutions, right, wrong)]
            seconds = time.perf_counter() - began
            totals = [sum(map(len, outputs)) for outputs in (solutions, right, wrong)]
            told = [f"{found} of {total}" if total else "–" for found, total in zip(counts, totals, strict=True)]
            print(
                f"| {name}, {judge.__name__.replace('_', ' ')} | {' | '.join(told)} | {sum(totals) / seconds:.0f} |",
                flush=True,
            )
        if arguments.show:
            show(golds, [[*one, *two] for one, two in zip(solutions, right, strict=True)], expected=True)
            show(golds, wrong, expected=False)
    if arguments.cases:
        cases = [json.loads(line) for line in arguments.cases.read_text().splitlines()]
        pairs = [(gold_answer(ProblemRow("", "", case["gold"], "")), case) for case in cases]
        for judge in (ours, by_math_verify):
            good = sum(judge(gold, case["output"]) == case["expected"] for gold, case in pairs)
            print(f"cases, {judge.__name__.replace('_', ' ')}: {good} of {len(cases)} as expected")
    seconds, output = hostile(arguments.hostile)
    print(f"{arguments.hostile} hostile outputs: the longest took {seconds:.1f} s ({output[:60]!r})")


if __name__ == "__main__":
    main()
