"""From what was typed to a `Config`: the command line and YAML files, `--help`, `--print_config`.

Both become a list of `_Given`, each of which jsonargparse reads as `--name=value`. So a value means the same
wherever it stands (YAML's own typing would make `mixed_precision: no` a boolean and `lr: 1e-3` a string), and
an error knows whom to name. Imports neither torch nor timm, so that all this takes no time.
"""

from __future__ import annotations

import difflib
import json
import sys
import typing
from argparse import ArgumentError, HelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from resist_ds.errors import UserError
from resist_ds.options.config import CHOICES, FIELDS, TYPES, Config
from resist_ds.options.deepspeed_file import DeepSpeedFile
from resist_ds.options.json_file import cut
from resist_ds.options.presets import contents
from resist_ds.options.strategy import STRATEGIES


class _Given(NamedTuple):
    name: str
    value: str
    where: str  # as the user would look for it: "--lr" or "runs.yaml:3: lr"


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads `argv` (default: the process's), with `--config` files first wherever they stand.

    `--help` and `--print_config` print and raise `SystemExit(0)`. Raises `UserError`, of one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if any(token in ("-h", "--help") for token in argv):
        parser.parse_args(["--help"])

    typed = list(_command_line(argv))
    from_files = [given for t in typed if t.name == "config" for given in _yaml_file(t.value)]
    print_config = [f"--print_config={t.value}".rstrip("=") for t in typed if t.name == "print_config"]
    options = [_plain(given) for given in from_files + [t for t in typed if t.name in FIELDS]]
    for given in (t for t in typed if t.name == "deepspeed" and t.value != "true"):
        raise UserError(
            f"--deepspeed takes no value, and {given.value!r} is one: type --deepspeed_config FILE.json"
        )
    if any(t.name == "deepspeed" for t in typed) and not any(o.name == "deepspeed_config" for o in options):
        raise UserError("--deepspeed needs a file: type --deepspeed_config FILE.json")
    options = _deepspeed_file(options) + options

    # Each alone first, so that an error names its option and file whatever jsonargparse's message looks like.
    for name, value, where in options:
        if "\0" in value or any(0xD800 <= ord(c) < 0xDC80 or 0xDCFF < ord(c) < 0xE000 for c in value):
            raise UserError(f"{where} is {cut(repr(value))}, which no file or name can hold: type another")
        try:
            if ":" in value and not {int, float}.isdisjoint(_kinds(name)):
                raise ArgumentError(None, "")  # YAML 1.1 makes 90 of 1:30, which nobody means
            parser.parse_args([f"--{name}={value}"])
        except ArgumentError:
            raise UserError(f"{where} is {cut(repr(value))}: type {_expected(name)}") from None
    try:
        values = parser.parse_args([f"--{given.name}={given.value}" for given in options] + print_config)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    return Config(**{name: values[name] for name in FIELDS})


def _deepspeed_file(options: Sequence[_Given]) -> list[_Given]:
    """What a DeepSpeed file decides; `Config` refuses what was typed to the contrary."""
    named = [given.value for given in options if given.name == "deepspeed_config"]
    if not named or named[-1] in ("", "null"):
        return []
    file = named[-1]
    typed = {given.name: given.value for given in options}
    parts = typed.get("accumulation_steps", "")
    size = typed.get("team_size", "1")
    alone = size == "1" and typed.get("strategy") not in [n for n, way in STRATEGIES.items() if way.stage]
    shared = _small(size) if size != "auto" else None
    found = DeepSpeedFile(file, _small(parts), alone, shared).options
    return [_Given(option, str(value), f"{file}: {name}") for option, (name, value) in found.items()]


def _small(text: str) -> int:
    """A number that was typed; 1 where it is none, which others will say."""
    return int(text) if text.isdecimal() and 0 < len(text) < 20 else 1


def _command_line(argv: Sequence[str]) -> Iterator[_Given]:
    """Cuts the command line into options; unlike argparse it allows `--lr -1e-3` and `--local-steps`."""
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") or _is_number(token):
            raise UserError(f"unexpected {token!r}: every option starts with --, for instance --lr 0.1")
        option, equals, value = token.partition("=")
        name = option[2:].replace("-", "_") if option.startswith("--") else ""
        if name not in (*FIELDS, "config", "print_config", "local_rank", "deepspeed"):
            raise UserError(f"unknown option {option}{_suggest(name or option[1:], '--')}")
        if not equals and name != "print_config":
            if rest and (not rest[0].startswith("-") or _is_number(rest[0])):
                value = rest.pop(0)
            elif bool in _kinds(name) or name == "deepspeed":
                value = "true"
            else:
                raise UserError(f"--{name} needs a value: type {_expected(name)}")
        yield _Given(name, value, f"--{name}")


def _plain(given: _Given) -> _Given:
    """A value as Python and sweeps write it (None, True, 8.0) in the words that the option has for it."""
    kinds, word = _kinds(given.name), given.value.strip().lower()
    if (bool in kinds and word in ("true", "false")) or word in CHOICES.get(given.name, ()):
        return given._replace(value=word)
    if word in ("none", "null"):
        null = "null" if type(None) in kinds else FIELDS[given.name].metadata["null"]
        return given if null is None else given._replace(value=null)
    if int in kinds:
        try:
            number = Decimal(word)
        except InvalidOperation:
            return given
        if number.is_finite() and number.adjusted() < 20 and number == number.to_integral_value():
            return given._replace(value=str(int(number)))
    return given


def _yaml_file(name: str) -> Iterator[_Given]:
    try:
        root = yaml.compose(contents("config", name, ".yaml"), Loader=yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"--config {name} cannot be read: it is nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:  # not text, no YAML
        raise UserError(f"--config {name} cannot be read: {' '.join(str(error).split())}") from None
    if root is None:
        return  # an empty file, or nothing but comments
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {name}: write one option a line, for instance 'lr: 0.1'")
    seen = set()
    for key, value in root.value:
        option = cut(key.value.replace("-", "_")) if isinstance(key, yaml.ScalarNode) else "a list"
        where = f"{name}:{key.start_mark.line + 1}: {option}"
        if option not in FIELDS:
            raise UserError(f"{where} is an unknown option{_suggest(option, '')}")
        if option in seen:
            raise UserError(f"{where} is given twice: remove one of them")
        seen.add(option)
        items = (
            value.value if isinstance(value, yaml.SequenceNode) and FIELDS[option].metadata["many"] else []
        )
        if items and all(isinstance(item, yaml.ScalarNode) for item in items):
            yield _Given(option, ",".join(item.value for item in items), where)
            continue
        null = isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null"
        nullable = type(None) in _kinds(option) or FIELDS[option].metadata["null"] is not None
        if not isinstance(value, yaml.ScalarNode) or (null and not nullable):
            raise UserError(f"{where} has {'no value' if null else 'a list'}: type {_expected(option)}")
        yield _Given(option, "null" if null else value.value, where)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _suggest(name: str, dashes: str) -> str:
    if name.removeprefix("no_") in TYPES and TYPES[name.removeprefix("no_")] is bool:
        return f" (type {dashes}{name.removeprefix('no_')}{' ' if dashes else ': '}false)"
    near = difflib.get_close_matches(name, [*FIELDS, "config", "print_config"] if dashes else FIELDS)
    # A beginning such as `act` is a near name too, however much is missing.
    near += [known for known in FIELDS if len(name) > 2 and known.startswith(name) and known not in near]
    if not near:
        return ": train.py --help lists them"
    return f" (did you mean {' or '.join(dashes + known for known in near[:3])}?)"


def _expected(name: str) -> str:
    if name in CHOICES:
        return f"one of {', '.join(CHOICES[name])}"
    if name not in TYPES:
        return "a YAML file" if name == "config" else "a number"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    others = {kind: " or ".join(typing.get_args(kind)) or "null" for kind in _kinds(name)}
    return " or ".join(words.get(kind, others[kind]) for kind in _kinds(name))


def _kinds(name: str) -> tuple[Any, ...]:
    """The alternatives of an option's type, as in `int | None`."""
    return typing.get_args(TYPES.get(name)) or (TYPES.get(name),)


def _parser() -> ArgumentParser:
    """jsonargparse's parser over Config's fields: types, `--help`, `--print_config`."""
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config FILE.yaml] [--OPTION VALUE] ...",
        description="Train a ResNet as sub-ResNets (ResIST). The --config files are read first, then the "
        "command line; --local-steps is the same as --local_steps. Defaults stand in brackets.",
        exit_on_error=False,  # errors become UserError, in `parse`
        formatter_class=HelpFormatter,  # jsonargparse's own would repeat every type in words
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="FILE.yaml", help="Options, one a line. May be repeated."
    )
    group: Any = parser
    for name, option in FIELDS.items():
        if option.metadata["group"]:
            group = parser.add_argument_group(option.metadata["group"])
        default = option.default if option.default_factory is MISSING else option.default_factory()
        shown = json.dumps(default) if not isinstance(default, str) else default
        names = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
        choices = f"{{{','.join(CHOICES.get(name, ()))}}}"
        bare: dict[str, Any] = {"nargs": "?", "const": True} if bool in _kinds(name) else {}
        doc = f"{option.metadata['doc']} [{shown}]".replace("%", "%%")
        metavar = names.get(_kinds(name)[0], choices)
        group.add_argument(f"--{name}", type=TYPES[name], default=default, help=doc, metavar=metavar, **bare)
    return parser
