"""Units of measure behind numbers: which one a text names, and how many of one make another; by pint.

In: what stands behind a number, in LaTeX or words. Out: a pint unit, or None where the text names no measure that
is known here: apples are things, not a unit. Knows nothing of answers.
"""

from __future__ import annotations

import functools
import re

import pint

KNOWN: dict[str, str] = {
    name: unit
    for unit, names in {
        "meter": "m meter meters metre metres",
        "centimeter": "cm centimeter centimeters",
        "millimeter": "mm millimeter millimeters",
        "kilometer": "km kilometer kilometers",
        "micrometer": "um micrometer micrometers micron microns",
        "nanometer": "nm nanometer nanometers",
        "angstrom": "angstrom angstroms",
        "foot": "ft foot feet",
        "inch": "inch inches",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "gram": "g gram grams",
        "kilogram": "kg kilogram kilograms",
        "pound": "lb lbs pound pounds",
        "ounce": "oz ounce ounces",
        "ton": "ton tons",
        "second": "s sec second seconds",
        "millisecond": "ms millisecond milliseconds",
        "minute": "min minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr year years",
        "liter": "l liter liters litre litres",
        "milliliter": "ml milliliter milliliters",
        "gallon": "gallon gallons",
        "quart": "quart quarts",
        "dollar": "dollar dollars usd",
        "centidollar": "cent cents",
        "degree": "degree degrees",
        "kelvin": "k kelvin kelvins",
        "joule": "j joule joules",
        "electron_volt": "ev",
        "newton": "n newton newtons",
        "watt": "w watt watts",
        "hertz": "hz hertz",
        "volt": "v volt volts",
        "mole": "mol mole moles",
        "erg": "erg ergs",
        "kilojoule": "kj kilojoule kilojoules",
        "kilocalorie": "kcal",
        "parsec": "pc parsec parsecs",
        "radian": "rad radian radians",
        "arcsecond": "arcsec arcsecs arcsecond arcseconds",
        "picometer": "pm",
        "mile / hour": "mph",
    }.items()
    for name in names.split()
}
"""Spellings, in small letters. Unknown ones are things to be counted."""
POWERS = {"square": 2, "sq": 2, "cubic": 3}
LATEX = (
    (r"\\(?:mathrm|text|textrm|rm|operatorname|mbox)\b", " "),
    (r"\\mu\s*\{?\s*m\b", " um "),
    (r"\\(?:AA|r?a?angstrom)\b", " angstrom "),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b|°", " degree "),
    (r"\\\$", " dollar "),
    (r"\\q?quad\b|\\cdot|\\times|\\,|\\;|\\ |\\!|~", " "),
    (r"\^\s*\{\s*(-?\d)\s*\}", r"^\1"),
    (r"[{}()$]", " "),
)
FACTOR = re.compile(r"(/)?\s*([a-z]+)\s*(?:\^\s*(-?\d))?")


@functools.cache
def _registry() -> pint.UnitRegistry:
    registry: pint.UnitRegistry = pint.UnitRegistry(on_redefinition="ignore")
    registry.define("dollar = [currency]")
    return registry


@functools.lru_cache(4096)
def unit_of(text: str) -> pint.Unit | None:
    """The unit that a text is, as 'square feet', '\\mathrm{~cm}', 'm/s^2' or 'km per hour'; None where it is none."""
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    text = re.sub(r"\bper\b", "/", text.lower()).strip(" .\n")
    found, power, at = _registry().dimensionless, 1, 0
    while at < len(text):
        factor = FACTOR.match(text, at)
        if not factor:
            if text[at].isspace():
                at += 1
                continue
            return None
        slash, name, exponent = factor.groups()
        at = factor.end()
        if name in POWERS and not slash:
            power = POWERS[name]
            continue
        if name not in KNOWN:
            return None
        found *= _registry().parse_units(KNOWN[name]) ** (power * int(exponent or 1) * (-1 if slash else 1))
        power = 1
    return None if found == _registry().dimensionless else found


def ratio(one: pint.Unit, other: pint.Unit) -> float | None:
    """How many `other` make one `one`; None where they measure different things."""
    try:
        return float((1 * one).to(other).magnitude)
    except pint.DimensionalityError:
        return None
