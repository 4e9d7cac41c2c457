"""Command lines and YAML files checked against typed configs; an unknown key is answered with the nearest valid one."""

import argparse
import difflib
import os
import re
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import jsonargparse

from helmholtz._checks import check
from helmholtz._display import StandardOutput
from helmholtz.cli.documents import Document, documents, read_documents

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

PATHS = {
    "checkpoint", "continue_from", "data", "data_files", "folder", "folders", "init_from", "output", "output_dir",
    "path", "picture", "plan", "runs", "save", "source", "sources", "validation_files", "validation_sources",
}  # fmt: skip
"""Last names of the options that hold files or folders: a leading ``~`` is the home directory."""

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises ValueError instead of printing and exiting, so that every error is one line.

    Attributes:
        keys: of an option that is a mapping, the keys that may also be given on their own: ``--option.key=value``.
    """

    keys: dict[str, list[str]]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(_readable(self, " ".join(str(message).split()))) from ex

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which keeps silent where the help cannot be written."""
        StandardOutput(file or sys.stdout).write(self.format_help())


def make_parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"helmholtz {command}", description=description)
    parser.keys = {}
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these settings; later ones win"
    )
    return parser


def parse(parser: Parser, arguments: list[str]) -> dict[str, Any]:
    """Values of ``arguments`` and of the YAML files they name, as nested dictionaries.

    Raises: ValueError for an unknown key (with the nearest valid one), a wrong type, or a file that is not YAML.
    """
    known = {action.dest: list(action.option_strings) for action in parser._actions}
    keys = {f"{name}.{key}": [f"--{name}.{key}"] for name in parser.keys for key in parser.keys[name]}
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=", 1)[0]
            if f"--{name}" not in {option for options in (known | keys).values() for option in options}:
                raise ValueError(f"unknown option --{name}{_suggestion(name, known | keys)}")
    arguments = read_documents(arguments, [name for name in known if _is_group(name, known)])
    for document in documents(arguments):
        _check_names(document, known)
    try:
        values = parser.parse_args(arguments).as_dict()
    except argparse.ArgumentError as error:
        parser.error(str(error), error)
    except OverflowError as error:  # an integer that is no float
        where = next(argument for argument in arguments if re.search(r"\d{300}", argument))
        name = where.source if isinstance(where, Document) else where.split("=")[0]
        raise ValueError(f"{name}: a number must have less than 300 digits") from error
    _check_nulls(parser, values)
    return {name: _finished(name, value) for name, value in values.items()}


def _check_names(document: Document, known: dict[str, list[str]]) -> None:
    names = Counter(_keys(document.content, "", set(known)))
    for name, count in names.items():
        if name == "config":
            raise ValueError(f"{document.source}: a config file names no other; give --config twice")
        if name not in known:
            raise ValueError(f"{document.source}: unknown key {name!r}{_suggestion(name, known)}")
        if _is_group(name, known):
            raise ValueError(f"{document.source}: {name} must be a mapping of names to values")
        if count > 1:
            raise ValueError(f"{document.source}: key {name!r} is given twice, nested and with dots")


def _check_nulls(parser: Parser, values: dict[str, Any]) -> None:
    """The parser takes null for everything. Raises: ValueError where the default is something."""
    for action in parser._actions:
        value: Any = values
        for part in action.dest.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is None and action.default not in (None, argparse.SUPPRESS):
            raise ValueError(f"{action.dest} must not be null, its default is {action.default!r}")


def _finished(name: str, value: Any) -> Any:
    """A value with ``~`` expanded in paths.

    Raises: ValueError for what no option means: an integer that 64 bits do not hold, a text that is no UTF-8, a path
    without a name (it would be the current folder).
    """
    if isinstance(value, dict):
        return {key: _finished(f"{name}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finished(name, inner) for inner in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value}")
    if isinstance(value, str):
        check_utf8(name, value)
        if name.split(".")[-1] in PATHS:
            check(value != "", name, value, "the name of a file or folder")
            return os.path.expanduser(value)
    return value


def output_file(name: str, value: str) -> Path:
    """The file that the option ``name`` asks for. Raises: ValueError if it cannot be written: before it is computed."""
    path = Path(value)
    check(not path.is_dir(), name, value, "a file, not a folder")
    _check_writable(name, value, path.parent)
    return path


def output_folder(name: str, value: str, *, figures: bool = False) -> Path:
    """``output_file`` for a folder. Raises: ImportError for want of matplotlib if it is to hold figures."""
    if figures:
        from helmholtz.evals.plots import file_types

        file_types()
    _check_writable(name, value, Path(value))
    return Path(value)


def output_picture(name: str, value: str) -> Path:
    """``output_file`` for a figure, whose suffix says its format."""
    from helmholtz.evals.plots import file_types

    suffix, kinds = Path(value).suffix[1:].lower(), file_types()
    check(suffix in ("", *kinds), name, value, f"a name that ends in one of {', '.join(kinds)}")
    return output_file(name, value)


def _check_writable(name: str, value: str, folder: Path) -> None:
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{name}: {value} cannot be written ({error.strerror})") from error


def check_utf8(name: str, text: str) -> None:
    """Raises: ValueError if bytes came that are no UTF-8, which Python reads as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not UTF-8 at character {error.start}, got {text[:100]!r}") from error


def _readable(parser: Parser, message: str) -> str:
    """The parser's complaint about a type in words: which option, what was wanted, what came."""
    message = message.removeprefix('Parser key "config": ')
    found = re.match(r'Parser key "([^"]+)"', message)
    action = next((action for action in parser._actions if found and action.dest == found[1]), None)
    if found is None or action is None:
        return message
    got = re.search(r".*\b(?:Got|Given) value: ?(.*)$", message)
    each = " each" if isinstance(action.nargs, str) else ""
    text = f"{found[1]} must{each} be {_wanted(getattr(action, '_typehint', action.type))}"
    return text if got is None else f"{text}, got {got[1]!r}"


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(part) for part in inner)
    if origin is tuple and ... not in inner:
        return f"a list of {len(inner)}: {', '.join(_wanted(part) for part in inner)}"
    if origin in (tuple, list):
        return f"a list, each {_wanted(inner[0])}"
    if origin is dict:
        return "a mapping"
    if is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in fields(hint))}"
    return KINDS.get(hint, str(hint))


def _keys(values: dict[Any, Any], prefix: str, known: set[str]) -> Iterator[str]:
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
