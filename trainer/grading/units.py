"""Units behind numbers: which unit a text names, and how to convert one to another, with pint.

In: the text behind a number, in LaTeX or words. Out: a pint unit; None if the text names no known unit: apples are
counted things. This module knows no answers.
"""

from __future__ import annotations

import functools
import re

import pint

# fmt: off
KNOWN = {
    "angstrom", "foot", "inch", "yard", "mile", "light_year", "astronomical_unit", "pound", "ounce", "ton", "minute",
    "hour", "day", "week", "fortnight", "month", "year", "decade", "century", "acre", "hectare", "gallon", "quart",
    "pint", "cup", "tablespoon", "teaspoon", "dollar", "cent", "euro", "sterling", "degree", "radian", "arcsecond",
    "micron", "mile_per_hour", "kilometer_per_hour", "erg",
}
"""Allowed units of pint, and three currencies. pint reads units into plain words: cats are centi-atmospheres."""
METRIC = {
    "meter", "gram", "second", "liter", "joule", "newton", "watt", "hertz", "volt", "ampere", "kelvin", "pascal",
    "mole", "parsec", "calorie", "tesla", "coulomb", "ohm", "farad", "electron_volt", "molar", "year",
}
"""Allowed units that take prefixes."""
PLAIN_WORDS = {"has", "mug", "camp", "damp", "kilos"}
# fmt: on
PREFIXES = {"", "tera", "giga", "mega", "kilo", "deci", "centi", "milli", "micro", "nano", "pico", "femto"}
LETTERS_OF_UNITS = "mgslLJNWVAKTFMhΩÅ"
OTHER_SPELLINGS = {
    "au": "astronomical_unit", "lightyear": "light_year", "lightyears": "light_year", "celsius": "celsius_scale",
    "fahrenheit": "fahrenheit_scale", "kmh": "kilometer_per_hour", "kms": "kilometer", "kgs": "kilogram",
    "cms": "centimeter", "secs": "second", "arcsecs": "arcsecond", "kilohm": "kiloohm", "kilohms": "kiloohm",
    "hrs": "hour", "usd": "dollar", "bucks": "dollar",
}  # fmt: skip
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
LATEX = (
    (r"\\(?:AA|r?a?angstrom)\b", " Å "),
    (r"\\mu\b\s*(?:\\(?:mathrm|text|rm)\b\s*)?\{?\s*", " μ"),
    (r"([kMGmμ])[\s}]*\\Omega\b", r"\1Ω "),
    (r"\\Omega\b", " Ω "),
    (r"\{?\s*\}?\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b|°", " degree "),
    (r"\\(?:mathrm|text|textrm|textbf|mathbf|textit|operatorname|mbox|rm)\b", " "),
    (r"\bdegrees?\s*[{\s]*(?:C\b|[cC]elsius\b)", " celsius "),
    (r"\bdegrees?\s*[{\s]*(?:F\b|[fF]ahrenheit\b)", " fahrenheit "),
    (r"\\\$", " dollar "),
    (r"\\?¢", " cent "),
    (r"€|\\euro\b", " euro "),
    (r"£|\\pounds\b", " sterling "),
    (r"''|\"|\^\s*\{\s*\\prime\s*\\prime\s*\}", " inch "),
    (r"'(?![A-Za-z])|\^\s*\{?\s*\\prime\b\s*\}?", " foot "),
    (r"\blight[\s-]+(?=years?\b)", "light"),
    (r"(?<=[a-z])\(e?s\)", "s"),
    (r"\\q?quad\b|\\cdot\b|\\times\b|\\[,;! ]|~", " "),
    (r"[{}()$]", " "),
    (r"\b(sq|cu)\.", r"\1 "),
    (r"^\s*(?:full|whole|complete|entire)\s+(?=[a-z])", " "),
    (r"\bper\b", " / "),
    (r"\bin\s+(?=[a-z])", ". "),  # minutes in total
)
FACTOR = re.compile(r"\s*(/)?\s*([A-Za-zμΩÅ]+)\s*(?:\^\s*(-?\d))?")


@functools.cache
def _registry() -> pint.UnitRegistry:
    registry: pint.UnitRegistry = pint.UnitRegistry(on_redefinition="ignore")
    registry.define("dollar = [currency]")
    registry.define("cent = dollar / 100")
    registry.define("euro = [other_currency]")
    registry.define("sterling = [third_currency]")
    registry.define("celsius_scale = [celsius]")  # degrees of a scale are no kelvins
    registry.define("fahrenheit_scale = [fahrenheit]")
    return registry


@functools.lru_cache(4096)
def unit_of(text: str) -> pint.Unit | None:
    """The unit at the start of a text, as 'square feet', '\\mathrm{~cm}', 'm/s^2', 'km per hour' or 'feet of rope';
    None if there is none."""
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
    """How many `other` make one `one`; None if they measure different things."""
    try:
        return float((1 * one).to(other).magnitude)
    except pint.DimensionalityError:
        return None


@functools.lru_cache(4096)
def _named(name: str) -> str | None:
    """pint's name of a unit. Symbols are case-sensitive, because mm and Mm differ; KM can only mean km."""
    if found := OTHER_SPELLINGS.get(name.lower()):
        return found
    if (len(name) == 1 and name not in LETTERS_OF_UNITS) or name.lower() in PLAIN_WORDS:
        return None
    shouted = len(name) > 1 and name.isupper()
    for spelling in (name, name.lower()):
        for prefix, unit, _ in _registry().parse_unit_name(spelling):
            if unit in KNOWN and not prefix and (len(name) > 2 or spelling == name or name in ("FT", "LB", "OZ", "YD")):
                return unit
            if unit == "year" and "y" not in spelling:
                continue  # pint's a, as in NA
            if unit in METRIC and prefix in PREFIXES and (spelling == name or shouted or len(name) > 3):
                return prefix + unit
    return None
