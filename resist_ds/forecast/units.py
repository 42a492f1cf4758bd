"""Quantities with a unit, as they are typed: a link's rate, a device's memory, its speed."""

import math
import re
from collections.abc import Mapping

from resist_ds.errors import UserError

BANDWIDTHS = {"kbit": 125e0, "mbit": 125e3, "gbit": 125e6, "tbit": 125e9}  # bytes a second
MEMORIES = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 1e6, "gb": 1e9, "tb": 1e12}  # bytes
SPEEDS = {"gflops": 5e8, "tflops": 5e11, "pflops": 5e14}  # multiply-adds a second, two operations each


def quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """`10gbit` in base units. Raises `UserError` where it is no positive number with one of the units."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)", text.strip().lower())
    value = float(found[1]) * units.get(found[2], 0) if found else 0.0
    if not 0 < value < math.inf:
        example = f"10{next(iter(units))}"
        raise UserError(
            f"{option} is {text!r}: type a number above 0 and a unit ({', '.join(units)}), such as {example}"
        )
    return value
