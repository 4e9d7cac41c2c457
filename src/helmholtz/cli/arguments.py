"""Command lines and YAML files checked against typed configs; an unknown key is answered with the nearest valid one."""

import argparse
import difflib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises ValueError instead of printing and exiting, so that every error is one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(" ".join(str(message).split())) from ex


def make_parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"helmholtz {command}", description=description)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these settings; later ones win"
    )
    return parser


def parse(parser: Parser, arguments: list[str]) -> dict[str, Any]:
    """Values of ``arguments`` and of the YAML files they name, as nested dictionaries.

    Raises: ValueError for an unknown key (with the nearest valid one), a wrong type, or a file that is not YAML.
    """
    known = {action.dest: list(action.option_strings) for action in parser._actions}
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=", 1)[0]
            if f"--{name}" not in {option for options in known.values() for option in options}:
                raise ValueError(f"unknown option --{name}{_suggestion(name, known)}")
    for file in config_files(arguments):
        for name in _keys(read_yaml(file), "", set(known)):
            if name == "config":
                raise ValueError(f"{file}: a config file names no other; give --config twice")
            if name not in known:
                raise ValueError(f"{file}: unknown key {name!r}{_suggestion(name, known)}")
            if _is_group(name, known):
                raise ValueError(f"{file}: {name} must be a mapping of names to values")
    try:
        values = parser.parse_args(arguments).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    _check_nulls(parser, values)
    return values


def _check_nulls(parser: Parser, values: dict[str, Any]) -> None:
    """The parser takes null for everything. Raises: ValueError where the default is something."""
    for action in parser._actions:
        value: Any = values
        for part in action.dest.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is None and action.default not in (None, argparse.SUPPRESS):
            raise ValueError(f"{action.dest} must not be null, its default is {action.default!r}")


def config_files(arguments: list[str]) -> list[Path]:
    """The files given with ``--config``."""
    files = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")]
    files += [after for flag, after in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
    return [Path(file) for file in files]


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ValueError naming the file if there is none."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, no such date, brackets within brackets
        raise ValueError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {file}: wanted a mapping of names to values, got {type(content).__name__}"
        )
    return content


def _keys(values: dict[str, Any], prefix: str, known: set[str]) -> Iterator[str]:
    """Dotted names of the settings in a nested mapping; what belongs to a group is descended into."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _is_group(name, known) and isinstance(value, dict):
            yield from _keys(value, f"{name}.", known)
        else:
            yield name


def _is_group(name: str, known: Collection[str]) -> bool:
    return any(other.startswith(f"{name}.") and not other.endswith(".help") for other in known)


def _suggestion(name: str, known: dict[str, list[str]]) -> str:
    names = [other for other in known if other not in ("help", "print_shtab")]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    by_field = difflib.get_close_matches(
        name.split(".")[-1], [n.split(".")[-1] for n in names], n=1, cutoff=0.6
    )
    if by_field:
        close = [other for other in names if other.split(".")[-1] == by_field[0]]
    return f"; did you mean {close[0]!r}?" if close else ""
