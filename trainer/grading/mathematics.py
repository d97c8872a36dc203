"""The meaning of LaTeX texts, and whether two texts mean the same: math-verify and sympy within a time limit.

In: texts. Out: sympy's values, numbers, verdicts. Call it in the main thread only, because the time limit is a signal.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from trainer.grading.normalize import squeezed

SECONDS = 3
"""Time limit for one comparison, and for reading each of its sides."""
AGAIN_SECONDS = 0.5
"""The signal repeats after this time, because Python drops an exception raised inside one of its own callbacks."""
TOTAL_SECONDS = 8
"""Time limit for one output."""
MOST_BITS = 100_000
"""Size limit for an exact number and for the steps of its computation. No signal interrupts Python within one huge
operation."""
ROUNDING = 1e-12
"""Relative tolerance for floating point."""
WHOLE_ANSWER = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="last"),
    )
]
"""math-verify's other extractions take a number out of a text that they do not understand. Its units turn 2t into 2."""
EXACT: dict[str, Any] = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": None}
"""Options for math-verify: 0.333333 is not 1/3, and 1 < x < 2 is (1, 2)."""
INEQUALITY = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan, sympy.Ne)
GROWING = (sympy.exp, sympy.sinh, sympy.cosh, sympy.factorial, sympy.factorial2, sympy.gamma, sympy.binomial)
HUGE = re.compile(
    r"\^\s*\{?\s*[-+]?\s*\d{6}|\^[\s{]*[-+\d]*\d\s*\^[\s{]*[-+]?\d|\d{6}[\s})]*!|!\s*[})]*\s*!.*!"
    r"|(?:binom|\\choose|\bgcd|\blcm|\\gcd|\\lcm).*(?:\d{6}|\^|!)|(?:\d{6}|\^|!).*\\choose"
)
"""What math-verify would compute while it reads: powers with huge exponents, towers, factorials, binomials."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off: they end another's


class Mathematics:
    """math-verify and sympy, with a time limit for each call and one for all calls.

    The methods raise TimeoutException.
    """

    def __init__(self) -> None:
        self._until = time.monotonic() + TOTAL_SECONDS

    def value(self, text: str) -> Any:
        """sympy's value of a whole LaTeX text; None if it cannot be read or is too large."""
        if HUGE.search(text):
            return None
        boxed = rf"\boxed{{{text}}}"

        def read() -> Any:
            found = parse(boxed, extraction_config=WHOLE_ANSWER, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
            return found[0] if found and bits(found[0]) <= MOST_BITS else None

        return self._limited(read)

    def number(self, text: str) -> Any:
        """The real number that a text means: exact if it is rational, else a float; None if it means no real number."""
        return self._number(self.value(text)) if text.strip() else None

    def same(self, one: str, other: str) -> bool:
        """Whether two texts are equal as texts or in mathematics."""
        if squeezed(one) == squeezed(other):
            return True
        mine, theirs = self.value(one), self.value(other)
        if mine is None or theirs is None:
            return False
        numbers = self._number(mine), self._number(theirs)
        if None not in numbers:
            return close(*numbers, ROUNDING)
        if (_is_range(mine) and _are_points(theirs)) or (_is_range(theirs) and _are_points(mine)):
            return False  # math-verify takes 3 < x < 7 for its ends
        if isinstance(mine, sympy.Eq) and isinstance(theirs, sympy.Eq):
            return self._same_equation(mine, theirs)
        return bool(self._limited(lambda: verify(_one_set(mine), _one_set(theirs), **EXACT)))

    def _number(self, value: Any) -> Any:
        def computed() -> Any:
            exact = value.doit()
            if not (exact.is_number and exact.is_real):
                return None
            rounded = exact if exact.is_Rational and not exact.is_Float else float(exact)
            return exact.evalf(15) if rounded == 0 and exact.is_zero is False else rounded  # too small for a float

        return self._limited(computed)

    def _same_equation(self, one: sympy.Eq, other: sympy.Eq) -> bool:
        def computed() -> bool:
            mine, theirs = (_frozen(side.lhs) - _frozen(side.rhs) for side in (one, other))
            share = sympy.simplify(mine / theirs)
            return bool(share.is_number and share.is_finite and share != 0)

        return bool(self._limited(computed))

    def _limited(self, work: Callable[[], Any]) -> Any:
        return limited(min(SECONDS, self._until - time.monotonic()), work)


def limited(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`; None if it raises, because sympy raises all kinds of exceptions. Raises TimeoutException.

    Limits may be nested: an inner limit restores the rest of the outer one.
    """
    if seconds <= 0:
        raise TimeoutException("an answer that takes too long")
    before, began = signal.signal(signal.SIGALRM, _too_long), time.monotonic()
    others, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
            return work()
        except Exception:
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also where the time was over in the line before
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - began), 0.001), interval)


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutException("a comparison that takes too long")


def _one_set(value: Any) -> Any:
    """Several inequalities as one set: x < -1 or x > 3. Any other value unchanged."""
    if isinstance(value, sympy.FiniteSet) and all(isinstance(one, INEQUALITY) for one in value):
        return sympy.Union(*(one.as_set() for one in value))
    return value


def _is_range(value: Any) -> bool:
    """Whether a value is a relation or a set of numbers: x > 3, 3 < x < 7, x in (3, 7)."""
    inside = isinstance(value, sympy.Eq) and value.has(sympy.Interval)
    return inside or isinstance(value, (sympy.And, sympy.Or, sympy.Union, *INEQUALITY))


def _are_points(value: Any) -> bool:
    """Whether a value is a list of numbers: 3, 7, or x = 3, x = 7."""
    return isinstance(value, sympy.FiniteSet) and not any(isinstance(one, (sympy.Set, *INEQUALITY)) for one in value)


def _frozen(value: Any) -> Any:
    """The value with symbols for derivatives. sympy takes the functions in derivatives for constants."""
    return value.subs({found: sympy.Symbol(str(found)) for found in value.atoms(sympy.Derivative)})


def close(one: Any, other: Any, part: float) -> bool:
    """Whether two numbers are equal: rational numbers exactly, others within the relative tolerance `part`.

    0 equals only 0.
    """
    if bool(one == 0) != bool(other == 0):
        return False
    exact = isinstance(one, sympy.Rational) and isinstance(other, sympy.Rational)
    return bool(one == other) if exact else math.isclose(float(one), float(other), rel_tol=part)


def bits(value: Any) -> float:
    """An upper bound of log2 of all numbers that the computation of a value passes through."""
    if not isinstance(value, sympy.Basic):
        return 8.0 * len(str(value))
    if isinstance(value, sympy.Rational):
        return float(max(abs(value.p), value.q).bit_length())
    limits = getattr(value, "limits", ())  # of a sum, a product, an integral
    if ranges := {one: ends[-1] for one, *ends in limits if ends and ends[-1].is_number and ends[-1].is_finite}:
        with sympy.evaluate(False):  # type: ignore[no-untyped-call]
            last = value.function.xreplace(ranges)
        terms = sympy.Mul(*ranges.values()) if isinstance(value, sympy.Product) else 1
        return bits(last) * float(terms)
    parts = [bits(part) for part in value.args]
    most = max(parts, default=2.0)
    if isinstance(value, sympy.Pow) and value.exp.is_number:  # also of a symbol, whose polynomial is as long
        return max(most, (parts[0] + 1) * 2.0 ** min(parts[1], 1000))
    if isinstance(value, GROWING) and value.is_number:
        return (most + 1) * 2.0 ** min(most, 1000)
    return sum(parts) if isinstance(value, sympy.Mul | sympy.Add | sympy.MatrixBase) else most
