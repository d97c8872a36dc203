"""What LaTeX texts mean, and whether two mean the same: math-verify and sympy within a time limit.

In: texts. Out: sympy's values, numbers, verdicts. Runs in a main thread only: the limit is a signal.
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
"""For one comparison, and as much for reading each side."""
AGAIN_SECONDS = 0.5
"""What is over its time is told again: Python drops an exception that is raised in a callback of its own."""
TOTAL_SECONDS = 8
"""For all of an answer."""
MOST_BITS = 100_000
"""Of an exact number, on its way to a value too: no signal interrupts Python while it computes a huge one."""
ROUNDING = 1e-12
"""Of floating point, in parts of a number."""
WHOLE_ANSWER = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="last"),
    )
]
"""math-verify's other readings take a number out of what they do not understand; its units make 2t a 2."""
EXACT: dict[str, Any] = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": None}
"""For math-verify: 0.333333 is not 1/3, and 1 < x < 2 is (1, 2)."""
INEQUALITY = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan, sympy.Ne)
GROWING = (sympy.exp, sympy.sinh, sympy.cosh, sympy.factorial, sympy.factorial2, sympy.gamma, sympy.binomial)
HUGE = re.compile(
    r"\^\s*\{?\s*[-+]?\s*\d{6}|\^[\s{]*[-+\d]*\d\s*\^[\s{]*[-+]?\d|\d{6}[\s})]*!|!\s*[})]*\s*!.*!"
    r"|(?:binom|\\choose|\bgcd|\blcm|\\gcd|\\lcm).*(?:\d{6}|\^|!)|(?:\d{6}|\^|!).*\\choose"
)
"""What math-verify may compute while it reads: powers of huge exponents, towers, factorials, binomials."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off: they end another's


class Mathematics:
    """math-verify and sympy, each call within a time limit, and all of them within one. Raise TimeoutException."""

    def __init__(self) -> None:
        self._until = time.monotonic() + TOTAL_SECONDS

    def value(self, text: str) -> Any:
        """What a whole LaTeX text is, as sympy has it; None where it is nothing that can be read, or is too large."""
        if HUGE.search(text):
            return None
        boxed = rf"\boxed{{{text}}}"

        def read() -> Any:
            found = parse(boxed, extraction_config=WHOLE_ANSWER, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
            return found[0] if found and bits(found[0]) <= MOST_BITS else None

        return self._limited(read)

    def number(self, text: str) -> Any:
        """The real number that a text is: exact where it is rational, else a float; None where it is none."""
        return self._number(self.value(text)) if text.strip() else None

    def same(self, one: str, other: str) -> bool:
        """Whether two texts are the same, or the same in mathematics."""
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
    """What `work` gives; None where it fails, for sympy fails in any way. Raises TimeoutException.

    A limit within another one gives that one its time back.
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
    """Several inequalities as one set: x < -1 or x > 3. Anything else as it is."""
    if isinstance(value, sympy.FiniteSet) and all(isinstance(one, INEQUALITY) for one in value):
        return sympy.Union(*(one.as_set() for one in value))
    return value


def _is_range(value: Any) -> bool:
    """x > 3, 3 < x < 7 or x in (3, 7)."""
    inside = isinstance(value, sympy.Eq) and value.has(sympy.Interval)
    return inside or isinstance(value, (sympy.And, sympy.Or, sympy.Union, *INEQUALITY))


def _are_points(value: Any) -> bool:
    """3, 7 or x = 3, x = 7."""
    return isinstance(value, sympy.FiniteSet) and not any(isinstance(one, (sympy.Set, *INEQUALITY)) for one in value)


def _frozen(value: Any) -> Any:
    """Derivatives as symbols, for sympy takes the functions in them for constants."""
    return value.subs({found: sympy.Symbol(str(found)) for found in value.atoms(sympy.Derivative)})


def close(one: Any, other: Any, part: float) -> bool:
    """Whether numbers are the same: rational ones exactly, others within `part` of either; 0 is 0 alone."""
    if bool(one == 0) != bool(other == 0):
        return False
    exact = isinstance(one, sympy.Rational) and isinstance(other, sympy.Rational)
    return bool(one == other) if exact else math.isclose(float(one), float(other), rel_tol=part)


def bits(value: Any) -> float:
    """An upper bound of log2 of what is computed on the way to a value: of it, its parts and their parts."""
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
