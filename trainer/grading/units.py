"""Units of measure behind numbers: which one a text names, and how many of one make another; by pint.

In: what stands behind a number, in LaTeX or words. Out: a pint unit, or None where the text names no measure that
is known here: apples are things, not a unit. Knows nothing of answers.
"""

from __future__ import annotations

import functools
import re

import pint

WORDS: dict[str, str] = {
    name: unit
    for unit, names in {
        "angstrom": "angstrom angstroms",
        "foot": "foot feet",
        "inch": "inch inches",
        "yard": "yard yards",
        "mile": "mile miles",
        "light_year": "lightyear lightyears",
        "astronomical_unit": "au",
        "pound": "pound pounds",
        "ounce": "ounce ounces",
        "ton": "ton tons",
        "minute": "minute minutes",
        "hour": "hour hours hr hrs",
        "day": "day days",
        "week": "week weeks",
        "fortnight": "fortnight fortnights",
        "month": "month months",
        "year": "year years yr yrs",
        "decade": "decade decades",
        "century": "century centuries",
        "acre": "acre acres",
        "hectare": "hectare hectares",
        "gallon": "gallon gallons",
        "quart": "quart quarts",
        "pint": "pint pints",
        "cup": "cup cups",
        "tablespoon": "tablespoon tablespoons tbsp",
        "teaspoon": "teaspoon teaspoons tsp",
        "dollar": "dollar dollars usd",
        "centidollar": "cent cents",
        "degree": "degree degrees",
        "celsius_scale": "celsius",
        "fahrenheit_scale": "fahrenheit",
        "radian": "radian radians rad",
        "arcsecond": "arcsec arcsecs arcsecond arcseconds",
        "micrometer": "micron microns",
        "kilometer": "kms",
        "kilogram": "kgs",
        "centimeter": "cms",
        "euro": "euro euros",
        "second": "sec secs",
        "mile / hour": "mph",
        "kilometer / hour": "kph kmh",
        "erg": "erg ergs",
        "kilocalorie": "kcal",
    }.items()
    for name in names.split()
}
"""Spellings, in small letters. Unknown ones are things to be counted."""
METRIC_WORDS: dict[str, str] = {
    name: unit
    for unit in ("meter", "gram", "second", "liter", "joule", "newton", "watt", "hertz", "volt", "ampere", "kelvin",
                 "pascal", "mole", "parsec", "calorie", "tesla", "coulomb", "ohm", "farad")
    for name in (unit, f"{unit}s")
} | {"metre": "meter", "metres": "meter", "litre": "liter", "litres": "liter"}  # fmt: skip
METRIC_SYMBOLS = {
    "m": "meter", "g": "gram", "s": "second", "l": "liter", "L": "liter", "J": "joule", "N": "newton", "W": "watt",
    "Hz": "hertz", "V": "volt", "A": "ampere", "K": "kelvin", "Pa": "pascal", "mol": "mole", "pc": "parsec",
    "eV": "electron_volt", "cal": "calorie", "T": "tesla", "Ω": "ohm", "F": "farad", "M": "molar", "yr": "year",
}  # fmt: skip
SYMBOLS = {"ft": "foot", "in": "inch", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce",
           "min": "minute", "h": "hour", "AU": "astronomical_unit", "ly": "light_year", "Å": "angstrom"}  # fmt: skip
PREFIX_WORDS = ["tera", "giga", "mega", "kilo", "deci", "centi", "milli", "micro", "nano", "pico", "femto"]
PREFIX_SYMBOLS = {"T": "tera", "G": "giga", "M": "mega", "k": "kilo", "d": "deci", "c": "centi", "m": "milli",
                  "u": "micro", "μ": "micro", "n": "nano", "p": "pico", "f": "femto"}  # fmt: skip
POWERS = {"square": 2, "sq": 2, "cubic": 3}
LATEX = (
    (r"\\(?:AA|r?a?angstrom)\b", " Å "),
    (r"\\mu\b\s*(?:\\(?:mathrm|text|rm)\b\s*)?\{?\s*", " μ"),
    (r"\\Omega\b", " Ω "),
    (r"\{?\s*\}?\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b|°", " degree "),
    (r"\\(?:mathrm|text|textrm|textbf|mathbf|textit|operatorname|mbox|rm)\b", " "),
    (r"\bdegrees?\s*[{\s]*(?:C\b|[cC]elsius\b)", " celsius "),
    (r"\bdegrees?\s*[{\s]*(?:F\b|[fF]ahrenheit\b)", " fahrenheit "),
    (r"\\\$", " dollar "),
    (r"\\?¢", " cent "),
    (r"\blight[\s-]+(?=years?\b)", "light"),
    (r"(?<=[a-z])\(e?s\)", "s"),
    (r"\\q?quad\b|\\cdot\b|\\times\b|\\[,;! ]|~", " "),
    (r"\^\s*\{\s*(-?\d)\s*\}", r"^\1"),
    (r"[{}()$]", " "),
    (r"\bper\b", " / "),
    (r"\bin\s+(?=[a-z])", ". "),  # minutes in total
)
FACTOR = re.compile(r"\s*(/)?\s*([A-Za-zμΩÅ]+)\s*(?:\^\s*(-?\d))?")


@functools.cache
def _registry() -> pint.UnitRegistry:
    registry: pint.UnitRegistry = pint.UnitRegistry(on_redefinition="ignore")
    registry.define("dollar = [currency]")
    registry.define("euro = [other_currency]")
    registry.define("celsius_scale = [celsius]")  # degrees of a scale are no kelvins
    registry.define("fahrenheit_scale = [fahrenheit]")
    return registry


@functools.lru_cache(4096)
def unit_of(text: str) -> pint.Unit | None:
    """The unit that a text begins with, as 'square feet', '\\mathrm{~cm}', 'm/s^2', 'km per hour' or 'feet of rope'.

    None where it begins with none.
    """
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    found, power, at, any_found = _registry().dimensionless, 1, 0, False
    while factor := FACTOR.match(text, at):
        slash, name, exponent = factor.groups()
        if name.lower() in POWERS and not slash:
            power = POWERS[name.lower()]
        elif (unit := _named(name)) is None:
            break
        else:
            found *= _registry().parse_units(unit) ** (power * int(exponent or 1) * (-1 if slash else 1))
            power, any_found = 1, True
        at = factor.end()
    return found if any_found else None


def ratio(one: pint.Unit, other: pint.Unit) -> float | None:
    """How many `other` make one `one`; None where they measure different things."""
    try:
        return float((1 * one).to(other).magnitude)
    except pint.DimensionalityError:
        return None


def _named(name: str) -> str | None:
    """pint's name of a unit. Symbols are case-sensitive, for mm and Mm differ; but KM can only be km."""
    if found := WORDS.get(name.lower()) or _prefixed(name.lower(), METRIC_WORDS, {word: word for word in PREFIX_WORDS}):
        return found
    spellings = (name, name.lower()) if len(name) > 1 and name.isupper() else (name,)
    for spelling in spellings:
        if found := SYMBOLS.get(spelling) or _prefixed(spelling, METRIC_SYMBOLS, PREFIX_SYMBOLS):
            return found
    return None


def _prefixed(name: str, units: dict[str, str], prefixes: dict[str, str]) -> str | None:
    if name in units:
        return units[name]
    for prefix, meaning in prefixes.items():
        if name.startswith(prefix) and (unit := units.get(name[len(prefix) :])):
            return meaning + unit
    return None
