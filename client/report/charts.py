"""Charts as inline SVG, small and plain: bars, lines, a marked threshold, axes with units.

In: numbers. Out: markup with CSS classes; the page defines their colours, for its themes and for print. Counts nothing.
Escapes every text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 290
LEFT, MARGIN, TOP, BOTTOM = 58, 20, 26, 48
"""Space for tick labels and titles around the plot, in units of the view box."""
LINE_HEIGHT, ROOM_BELOW = 16, 0.4
"""Height of a line of text at a threshold; height of a dot, relative to the plot, that leaves room for text below."""
SMALLEST = 1e-300
"""A scale that ends below this gets one tick, at 0: floats cannot divide it."""


@dataclass(frozen=True)
class Axis:
    """A scale with its title (units included) and labelled ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value between low (0) and high (1); values outside are put on the edge."""
        if self.log:
            value = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            value = (value - self.low) / ((self.high - self.low) or 1.0)
        return min(max(value, 0.0), 1.0)


@dataclass(frozen=True)
class Bars:
    """Columns from edge to edge. Those from `marked_from` on have the CSS class `marked`."""

    edges: Sequence[float]  # [n + 1]
    heights: Sequence[float]  # [n]
    marked_from: float


@dataclass(frozen=True)
class Line:
    """A line through points. `style`: its CSS class, 'first' or 'second', which differ by dashes as well as colour."""

    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "first"


@dataclass(frozen=True)
class Threshold:
    """A dashed vertical line with words at its top, and a dot on the curve if `y` is given.

    `under`: further lines of text under the words. With them, the text is at the line's foot, if the dot leaves room.
    """

    x: float
    words: str
    y: float | None = None
    under: Sequence[str] = ()


@dataclass(frozen=True)
class Note:
    """Words right of `x`, one text line below the words of a threshold."""

    x: float
    words: str


@dataclass(frozen=True)
class Ring:
    """A ring around a point of a curve."""

    x: float
    y: float


Mark = Bars | Line | Threshold | Note | Ring


def decades(low: float, high: float) -> list[tuple[float, str]]:
    """A tick at each power of ten between two values."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [(10.0**power, f"{10.0**power:g}" if power > -5 else f"1e{power}") for power in powers]


def even(high: float, unit: str = "") -> list[tuple[float, str]]:
    """About five round ticks from 0 to `high`."""
    if not high > SMALLEST:
        return [(0.0, f"0{unit}")]
    step = 10.0 ** math.floor(math.log10(high / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if high / (step * factor) <= 5)
    return [(index * step, f"{index * step:,.6g}{unit}") for index in range(math.floor(high / step + 1e-9) + 1)]


def chart(x: Axis, y: Axis, marks: Sequence[Mark], told: str, right: Axis | None = None) -> Markup:
    """One chart. `told`: a description for screen readers. `right`: a second scale of y."""
    margin = LEFT if right else MARGIN
    inner = WIDTH - LEFT - margin, HEIGHT - TOP - BOTTOM

    def at(value: float) -> float:
        return round(LEFT + inner[0] * x.share(value), 1)

    def up(value: float) -> float:
        return round(TOP + inner[1] * (1 - y.share(value)), 1)

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, told)]
    parts += [_level(up(value), WIDTH - margin, label) for value, label in y.ticks]
    parts += [_svg_text(at(value), TOP + inner[1] + 18, label, "middle") for value, label in x.ticks]
    if right:
        for value, label in right.ticks:
            parts.append(_svg_text(WIDTH - margin + 6, TOP + inner[1] * (1 - right.share(value)) + 4, label, "start"))
        parts.append(_svg_text(WIDTH - 4, 14, right.title, "end", "title"))
    parts.append(_svg_text(4, 14, y.title, "start", "title"))
    parts.append(_svg_text(LEFT + inner[0] / 2, HEIGHT - 8, x.title, "middle", "title"))
    for mark in marks:
        if isinstance(mark, Bars):
            for (left, end), height in zip(pairwise(mark.edges), mark.heights, strict=True):
                style = "bar marked" if left >= mark.marked_from else "bar"
                width = max(at(end) - at(left) - 0.6, 0.6)
                parts.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{:.1f}" height="{:.1f}"/>').format(
                        style, at(left), up(height), width, up(0) - up(height)
                    )
                )
        elif isinstance(mark, Line):
            points = " ".join(f"{at(a)},{up(b)}" for a, b in zip(mark.xs, mark.ys, strict=True))
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(mark.style, points))
        elif isinstance(mark, Note):
            parts.append(_svg_text(at(mark.x) + 5, TOP + 31, mark.words, "start", "words"))
        elif isinstance(mark, Ring):
            parts.append(Markup('<circle class="ring" cx="{}" cy="{}" r="4"/>').format(at(mark.x), up(mark.y)))
        else:
            where, anchor = at(mark.x), "start" if x.share(mark.x) < 0.6 else "end"
            parts.append(
                Markup('<line class="threshold" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(where, TOP, up(y.low))
            )
            beside, first = where + (5 if anchor == "start" else -5), TOP + 11
            if mark.under and mark.y is not None and y.share(mark.y) > ROOM_BELOW:
                first = HEIGHT - BOTTOM - 8 - LINE_HEIGHT * len(mark.under)
            for line, words in enumerate((mark.words, *mark.under)):
                parts.append(
                    _svg_text(beside, first + LINE_HEIGHT * line, words, anchor, "small-words" if line else "words")
                )
            if mark.y is not None:
                parts.append(Markup('<circle class="dot" cx="{}" cy="{}" r="4"/>').format(where, up(mark.y)))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _level(height: float, end: float, label: str) -> Markup:
    line = Markup('<line class="level" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, end, height)
    return line + _svg_text(LEFT - 6, height + 4, label, "end")


def _svg_text(x: float, y: float, words: str, anchor: str, style: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, escape(words)
    )
