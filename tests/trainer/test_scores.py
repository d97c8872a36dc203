"""Intervals and p-values against published figures and the definition."""

from math import comb

import pytest
from rich.console import Console

from trainer.scores import paired, result, score, table


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_interval_is_wilsons(correct, n, interval):
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    found = score([True] * correct + [False] * (n - correct))
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


def test_the_table_compares_where_there_is_something_to_compare():
    def shown(results):
        console = Console(width=120, markup=False)
        with console.capture() as capture:
            console.print(table(results))
        return capture.get()

    alone = shown([result("demo", [True, False, True, True])])
    assert "accuracy" in alone and "75.0% [30.1%, 95.4%]" in alone and "before" not in alone
    both = shown([result("demo", [True, True], [True, False])])
    assert all(word in both for word in ("before", "after", "fixed", "broken", "McNemar's p", "50.0%", "100.0%"))
