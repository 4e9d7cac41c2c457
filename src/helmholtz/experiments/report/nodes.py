"""JSON files, and lines of ``runs.jsonl``, read in such a way that every value knows where it lies."""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from helmholtz._checks import check
from helmholtz._json import parse_json

Rule = Literal["value", "mean", "sum", "set"]
"""How a cell comes from its sources: the one value, mean and sample deviation, sum, or all values that differ."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value inside a JSON file, or inside ``runs.jsonl``, taken as an object of its lines by their runs' names."""

    file: str
    """Path as shown: below the current folder if the file is."""
    pointer: str
    """RFC 6901; empty for the whole file. In ``runs.jsonl`` its first step is the name of a run."""
    value: Any

    def __getitem__(self, key: str | int) -> "Node":
        """Raises: ValueError naming file and place if there is nothing."""
        step = str(key).replace("~", "~0").replace("/", "~1")
        try:
            return Node(self.file, f"{self.pointer}/{step}", self.value[key])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.source}: no {key!r} there") from error

    def at(self, place: str) -> "Node":
        """What lies at ``place``, keys of objects with ``/`` between them; itself for none."""
        return functools.reduce(Node.__getitem__, place.split("/") if place else (), self)

    def __iter__(self) -> Iterator["Node"]:
        """Children, in order."""
        keys = self.value if isinstance(self.value, dict) else range(len(self.value))
        return (self[key] for key in keys)

    @property
    def name(self) -> str:
        """The last step of the pointer: what an object calls this child."""
        return self.pointer.rsplit("/", 1)[-1].replace("~1", "/").replace("~0", "~")

    @property
    def source(self) -> str:
        """Percent-encoded, so that it holds no blank."""
        return f"{quote(self.file)}#{quote(self.pointer)}"


def read_node(file: Path) -> Node:
    """The whole file. Raises: ValueError if it is not JSON."""
    try:
        content = parse_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    return Node(shown(file), "", content)


def shown(file: Path) -> str:
    """The path of a file as the page names it: below the current folder if the file is."""
    absolute, here = file.absolute(), Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and for a number how it comes from where."""

    text: str
    sources: tuple[str, ...] = ()
    """``file#pointer`` each."""
    rule: Rule | None = None
    spec: str = ""
    """Format specification of the number."""
    prefix: str = ""


def label(text: str) -> Cell:
    """A cell that is no result."""
    return Cell(text)


def number(nodes: Node | Sequence[Node], spec: str, *, rule: Rule | None = None, prefix: str = "") -> Cell:
    """A cell of one value, or of the mean of several with their sample deviation; what is None or NaN is left out."""
    found = [nodes] if isinstance(nodes, Node) else list(nodes)
    found = [node for node in found if node.value is not None and node.value == node.value]
    if not found:
        return label("")
    chosen: Rule = rule or ("value" if len(found) == 1 else "mean")
    check(chosen != "value" or len(found) == 1, "nodes", len(found), "one for a value")
    text = prefix + format_values([node.value for node in found], chosen, spec)
    return Cell(text, tuple(node.source for node in found), chosen, spec, prefix)


def format_values(values: Sequence[Any], rule: Rule, spec: str) -> str:
    """The text of a cell, without its prefix."""
    if rule == "set":
        return ", ".join(dict.fromkeys(format(value, spec) for value in values))
    if rule == "sum":
        return format(sum(values), spec)
    mean = format(statistics.fmean(values), spec) if rule == "mean" else format(values[0], spec)
    if rule == "mean" and len(values) > 1:
        return f"{mean} ± {format(statistics.stdev(values), spec)}"
    return mean


T = TypeVar("T")


def grouped(nodes: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Nodes, or rows of them, by a key, in the order of their first."""
    groups: dict[Any, list[T]] = {}
    for node in nodes:
        groups.setdefault(key(node), []).append(node)
    return groups


def by(place: str) -> Callable[[Node], Any]:
    """A key for ``grouped``: the value at ``place``."""
    return lambda node: node.at(place).value


def mean(nodes: Sequence[Node], place: str) -> float:
    """Of what lies at ``place`` in each."""
    return float(sum(node.at(place).value for node in nodes) / len(nodes))


def ordered(groups: dict[str, list[Node]], names: Iterable[str]) -> dict[str, list[Node]]:
    """The groups in the order of ``names``, and those that it does not have behind."""
    return {name: groups[name] for name in dict.fromkeys([*names, *groups]) if name in groups}
