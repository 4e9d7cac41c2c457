"""What a section of the report is made of, and where its files are looked for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helmholtz.studies.queue import RESULTS, TIMINGS
from helmholtz.studies.report.nodes import Cell, Node, label, number, read_node


@dataclass(frozen=True, slots=True)
class Table:
    """A row of column titles, and rows whose first cell names them."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture as inline SVG."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """What was asked, what came out, how to have it again, and what is missing."""

    anchor: str
    title: str
    asked: str
    command: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    provenance: tuple[tuple[str, Cell], ...] = ()
    """Hardware, seeds, commit and so on by their names."""
    missing: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.tables


def locate(folders: Sequence[Path], *paths: str) -> Path | None:
    """The first of ``paths`` that lies below a folder, or whose first part a folder is."""
    for path in paths:
        first, _, rest = path.partition("/")
        for folder in folders:
            candidates = [folder / path]
            if folder.resolve().name == first:
                candidates.append(folder / rest)
            for candidate in candidates:
                if candidate.exists():
                    return candidate
    return None


def locate_queue(folders: Sequence[Path], *paths: str) -> Path | None:
    """The first of ``paths`` that holds results of a queue."""
    found = (locate(folders, path) for path in paths)
    return next(
        (folder for folder in found if folder is not None and any((folder / RESULTS).glob("*.json"))), None
    )


def queue_nodes(folder: Path) -> list[Node]:
    """The results of a queue, in the order of their names."""
    return [read_node(file) for file in sorted((folder / RESULTS).glob("*.json"))]


def incomplete(found: Iterable[str], wanted: Mapping[str, int]) -> tuple[str, ...]:
    """What is missing of a grid.

    Args:
        found: the part of the grid that each run belongs to.
        wanted: runs of each part.
    """
    counts = Counter(found)
    return tuple(f"{part}: {counts[part]} of {n} runs" for part, n in wanted.items() if counts[part] < n)


def queue_provenance(folder: Path, nodes: Sequence[Node]) -> tuple[tuple[str, Cell], ...]:
    """Of a queue: seeds from the settings, the rest from the files beside the results."""
    names = [Path(node.file).name for node in nodes]
    timings = [read_node(folder / TIMINGS / name) for name in names if (folder / TIMINGS / name).exists()]
    seeds = sorted((node["settings"]["seed"] for node in nodes), key=lambda node: node.value)
    return (
        ("runs", label(f"{len(nodes)} files in {Path(nodes[0].file).parent.as_posix()}")),
        ("seeds", number(seeds, "d", rule="set")),
        *hardware(timings),
        ("CPU seconds", number([timing["cpu_seconds"] for timing in timings], ",.0f", rule="sum")),
    )


def hardware(nodes: Sequence[Node]) -> tuple[tuple[str, Cell], ...]:
    """Processor, threads, torch and commit of files that have ``hardware`` and ``commit``."""
    return (
        *(
            (name, number([node["hardware"][name] for node in nodes], "", rule="set"))
            for name in ("processor", "threads", "torch")
        ),
        ("commit", number([node["commit"] for node in nodes], "", rule="set")),
    )


def absent(anchor: str, title: str, asked: str, command: str, where: str) -> Section:
    """A section whose results are not there."""
    return Section(anchor, title, asked, command, missing=(f"No results yet: nothing at {where}.",))
