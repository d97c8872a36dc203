"""Intervals and p-values against published figures and the definition."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from rich.console import Console

from trainer.evaluation.records import Record
from trainer.evaluation.scores import comparison_of, paired, pass_at_k, score
from trainer.evaluation.summary import markdown, table


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_interval_is_wilsons(correct, n, interval):
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    found = score([[True]] * correct + [[False]] * (n - correct))
    assert found.interval == pytest.approx(interval, abs=5e-5)
    assert (found.n, found.correct, found.accuracy) == (n, correct, correct / n)


@pytest.mark.parametrize(("fixed", "broken"), [(9, 2), (2, 9), (5, 5), (1, 0), (0, 0), (189, 10)])
def test_mcnemar_is_exact_on_the_problems_where_the_two_differ(fixed, broken):
    n = fixed + broken
    tail = sum(comb(n, i) for i in range(min(fixed, broken) + 1)) / 2**n
    before = [False] * fixed + [True] * broken + [True, False] * 7
    after = [True] * fixed + [False] * broken + [True, False] * 7
    found = paired(before, after)
    assert (found.fixed, found.broken) == (fixed, broken)
    assert found.p == pytest.approx(min(1.0, 2 * tail))


def record(model, number, index, right):
    output = f"`{model}` says\n\\boxed{{{int(right)}}}"
    return Record(model, "demo", number, f"p{number}", index, "q?", output, str(int(right)), "1", right)


def records(model, verdicts):
    return [
        [record(model, number, index, right) for index, right in enumerate(samples)]
        for number, samples in enumerate(verdicts)
    ]


def shown(comparisons):
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        console.print(table(comparisons))
    return capture.get()


def test_the_table_compares_where_there_is_something_to_compare():
    one, both = [[True], [False], [True], [True]], [[True], [True], [False], [True]]
    alone = shown([comparison_of("demo", [("base", records("base", one))])])
    assert "75.0% [30.1%, 95.4%]" in alone and "McNemar" not in alone
    two = comparison_of("demo", [("base", records("base", one)), ("tuned", records("tuned", both))])
    assert all(word in shown([two]) for word in ("base", "tuned", "fixed", "broken", "McNemar's p"))
    assert (two.results[1].paired.fixed, two.results[1].paired.broken) == (1, 1)
    text = markdown([two])
    assert text.count("## fixed by tuned: demo, problem p1") == text.count("## broken by tuned: demo, problem p2") == 1
    assert "    `base` says" in text  # quoted as code


def test_pass_at_k_is_the_chance_of_a_draw_that_holds_a_right_one():
    for n, correct, k in ((5, 2, 1), (5, 2, 3), (6, 0, 4), (4, 4, 2), (7, 1, 7)):
        draws = list(combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_several_samples_are_averaged_with_an_interval_over_problems():
    rng = np.random.default_rng(1)
    rates = rng.uniform(size=300)
    verdicts = [list(rng.uniform(size=8) < rate) for rate in rates]
    found = score(verdicts)
    mean, spread = np.mean(verdicts), np.std(np.mean(verdicts, axis=1)) / np.sqrt(300)
    assert (found.n, found.samples, found.accuracy) == (300, 8, pytest.approx(mean))
    assert found.interval == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.006)
    assert score([[True] * 70]).pass_at.keys() == {1, 2, 4, 8, 16, 32, 64, 70}
    assert list(found.pass_at) == [1, 2, 4, 8] and found.pass_at[1] == pytest.approx(mean)
    assert found.pass_at[8] == pytest.approx(np.mean(np.any(verdicts, axis=1)))
    compared = comparison_of("demo", [("base", records("base", verdicts)), ("tuned", records("tuned", verdicts))])
    assert compared.results[1].paired is None and "pass@8" in shown([compared])


@pytest.mark.parametrize(
    ("verdicts", "like"),
    [
        ([[False] * 8] * 100, [[False]] * 100),  # samples that all agree count once
        ([[True] * 8] * 50 + [[False] * 8] * 50, [[True]] * 50 + [[False]] * 50),
        (
            [[True, False] * 4] * 100,
            [[True, False][index % 2 :][:1] for index in range(800)],
        ),  # as if independent
        ([[True, False, False, False]], [[True, False][:1]]),
    ],
)
def test_the_interval_of_several_samples_lies_between_those_of_one_and_of_as_many_problems(verdicts, like):
    low, high = score(verdicts).interval
    if len(verdicts) > 1:
        assert (low, high) == pytest.approx(score(like).interval, abs=0.002)
    assert 0 <= low < high <= 1 and high - low > 0.03


def test_what_people_and_models_write_stays_text_in_markdown():
    evil = "x\n\n# INJECTED\n<script>alert(1)</script> [a](b) | c"
    one = Record(evil, evil, 0, evil, 0, evil, evil, evil, evil, False)
    other = Record(evil, evil, 0, evil, 0, evil, evil, evil, evil, True)
    text = markdown([comparison_of(evil, [("base", [[one]]), (evil, [[other]])])])
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in table}
    assert len(table) == 4 and len(columns) == 1
    outside = [line for line in text.splitlines() if not line.startswith("    ")]
    assert "INJECTED" in text and not any(line.startswith("# INJ") for line in outside)
    assert not any("<script>" in line.replace("\\<", "") for line in outside if "`" not in line)
