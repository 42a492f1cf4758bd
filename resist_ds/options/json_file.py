"""A JSON file of options, read strictly: whatever is in it, the answer is its fields or one line.

Python's own reader takes the last of two values for one field, and NaN and Infinity for numbers; DeepSpeed's
takes comments too, which JSON has not.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from resist_ds.errors import UserError
from resist_ds.options.presets import contents

Json = dict[str, Any]

_TWICE = object()  # in place of a field's value
_DEEPEST = 32  # levels; DeepSpeed's own fields have five


def read(option: str, name: str) -> Json:
    """The fields of a file.

    Args:
        option: that names it on the command line, for the error.

    Raises:
        UserError: it cannot be read, is no JSON object, or has a field that says nothing certain.
    """
    try:
        found = json.loads(contents(option, name, ".json"), object_pairs_hook=_once, parse_int=_integer)
    except RecursionError:
        raise UserError(f"--{option} {name} is nested too deeply: DeepSpeed has no such fields") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"--{option} {name} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--{option} {name} is no JSON object: write {{}} around its fields")
    if wrong := list(_uncertain(found)):
        raise UserError(f"{name}: {joined(wrong)}")
    return found


def shown(value: object) -> str:
    """A value as it stands in the file, or its beginning."""
    return cut(json.dumps(value, ensure_ascii=False))


def cut(text: str) -> str:
    """The text, or the beginning of a long one."""
    return text if len(text) <= 60 else f"{text[:57]}…"


def joined(words: Sequence[str]) -> str:
    """All that is wrong with a file, in one line."""
    more = [f"and {len(words) - 20} more"] if len(words) > 20 else []
    return "; ".join([*words[:20], *more])


def _once(pairs: list[tuple[str, Any]]) -> Json:
    times = Counter(name for name, _ in pairs)
    return {name: value if times[name] == 1 else _TWICE for name, value in pairs}


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # above 4,300 digits Python refuses


def _uncertain(fields: Json) -> Iterator[str]:
    """What is wrong with fields of any depth, without calling itself for each level."""
    rest: list[tuple[str, Any, int]] = [("", fields, 0)]
    while rest:
        where, value, depth = rest.pop()
        if value is _TWICE:
            yield f"{cut(where)} is given twice: remove one of them"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{cut(where)} is no finite number: write one"
        elif isinstance(value, dict | list) and depth == _DEEPEST:
            yield f"{cut(where)} is nested too deeply: leave it out"
        elif isinstance(value, dict):
            inside = [(f"{where}.{cut(name)}" if where else cut(name), each) for name, each in value.items()]
            rest += [(name, each, depth + 1) for name, each in reversed(inside)]
        elif isinstance(value, list):
            rest += [(f"{where}[{i}]", each, depth + 1) for i, each in reversed(list(enumerate(value)))]
