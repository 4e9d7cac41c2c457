"""What a section of the report is made of, and where its files are looked for."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helmholtz.experiments.records import RESULTS, RUNS, TIMINGS, read_lines
from helmholtz.experiments.report.charts import dot_chart
from helmholtz.experiments.report.nodes import Cell, Node, label, number, read_node, shown

Provenance = tuple[tuple[str, Cell], ...]
Rows = Iterable[tuple[str, Any]]
"""Names, and what columns read."""
Column = Callable[[Any], Cell]
"""Of what ``table`` knows of a row."""


@dataclass(frozen=True, slots=True)
class Table:
    """A row of column titles, and rows whose first cell names them."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure as inline SVG."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Lines in letters of one width: samples, commands."""

    caption: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """What was asked, what came out, how to have it again, and what is missing."""

    anchor: str
    title: str
    asked: str
    command: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    provenance: Provenance = ()
    """Hardware, seeds, commit and so on by their names."""
    missing: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Paragraphs before the tables."""
    listings: Sequence[Listing] = ()

    @property
    def empty(self) -> bool:
        return not self.tables and not self.listings


class Found(NamedTuple):
    """What came out, as in ``Section``."""

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    provenance: Provenance = ()
    missing: Sequence[str] = ()


Build = Callable[[Sequence[Path]], Section]


def section(
    title: str, asked: str, command: str, *paths: str, find: Callable[..., Any]
) -> Callable[[Callable[[Any], Found]], Build]:
    """A function of what ``find(folders, *paths)`` gives as a section that bears its name.

    The section says so where that is None: its results are not there.
    """

    def decorate(fill: Callable[[Any], Found]) -> Build:
        def build(folders: Sequence[Path]) -> Section:
            results = find(folders, *paths)
            absent = Found((), missing=(f"No results yet: nothing at {paths[0]}.",))
            found = absent if results is None else fill(results)
            return Section(fill.__name__, title, asked, command, *found)

        return build

    return decorate


def table(caption: str, first: str, rows: Rows, columns: Mapping[str, Column]) -> Table:
    """A line per row, its name under the title ``first``, and a cell of each column."""
    lines = ((label(name), *(column(row) for column in columns.values())) for name, row in rows)
    return Table(caption, (first, *columns), tuple(lines))


def column(place: str, spec: str, *, only: int | None = None, where: tuple[str, Any] | None = None) -> Column:
    """Of rows that are nodes: the mean of what lies at ``place`` in each.

    Args:
        only: number of the one node that counts.
        where: a place, and the value that counting nodes have there.
    """

    def cell(nodes: Sequence[Node]) -> Cell:
        counted = nodes if only is None else nodes[only : only + 1]
        if where is not None:
            counted = [node for node in counted if node.at(where[0]).value == where[1]]
        return number([node.at(place) for node in counted], spec)

    return cell


def dots(
    caption: str, rows: Iterable[tuple[str, Sequence[Node]]], place: str, *, x: str, log_x: bool = False
) -> Figure:
    """A mark per node of every row, where the number at ``place`` in it says."""
    marks = [(name, [node.at(place).value for node in nodes]) for name, nodes in rows]
    return Figure(caption, dot_chart(marks, x=x, log_x=log_x))


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


def file_node(folders: Sequence[Path], *paths: str) -> Node | None:
    """The content of the first of ``paths`` that is there."""
    file = locate(folders, *paths)
    return None if file is None else read_node(file)


def run_nodes(folders: Sequence[Path], *paths: str) -> list[Node] | None:
    """``queue_nodes`` of the first of ``paths`` that holds some."""
    folder = locate_queue(folders, *paths)
    return None if folder is None else queue_nodes(folder)


def locate_queue(folders: Sequence[Path], *paths: str) -> Path | None:
    """The first of ``paths`` that holds results of a queue."""
    found = (locate(folders, path) for path in paths)
    return next((folder for folder in found if folder is not None and _has_runs(folder)), None)


def _has_runs(folder: Path) -> bool:
    return (folder / RUNS).exists() or any((folder / RESULTS).glob("*.json"))


def queue_nodes(folder: Path) -> list[Node]:
    """The runs of a queue in the order of their names, whether they are folded or have files of their own."""
    names = [file.stem for file in (folder / RESULTS).glob("*.json")]
    records = Node(shown(folder / RUNS), "", read_lines(folder / RUNS))
    runs = {name: read_node(folder / RESULTS / f"{name}.json") for name in names}
    runs |= {name: records[name] for name in records.value}
    return [runs[name] for name in sorted(runs)]


def timing(run: Node, part: str | None = None) -> Node | None:
    """When, where and how long a run of ``queue_nodes`` took, or the times of a part of it; None if they are lost."""
    if "timing" in run.value:
        times = run["timing"]
        return times if part is None else (times[part] if part in times.value else None)
    own = Path(run.file)
    file = own.parents[1] / TIMINGS / (own.name if part is None else f"{own.stem}.{part}.json")
    return read_node(file) if file.exists() else None


def incomplete(found: Iterable[str], wanted: Mapping[str, int]) -> tuple[str, ...]:
    """What is missing of a grid.

    Args:
        found: the part of the grid that each run belongs to.
        wanted: runs of each part.
    """
    counts = Counter(found)
    return tuple(f"{part}: {counts[part]} of {n} runs" for part, n in wanted.items() if counts[part] < n)


def queue_provenance(nodes: Sequence[Node]) -> Provenance:
    """Of the runs of a queue: seeds from their settings, the rest from their timings."""
    timings = [times for node in nodes if (times := timing(node)) is not None and times.value]
    seconds = [times["cpu_seconds"] for times in timings if "cpu_seconds" in times.value]
    by_seed = sorted(nodes, key=lambda node: node.at("settings/seed").value)
    places = dict.fromkeys(Path(node.file) if node.pointer else Path(node.file).parent for node in nodes)
    return (
        ("runs", label(f"{len(nodes)} in {', '.join(place.as_posix() for place in places)}")),
        seeds(by_seed, "settings/seed"),
        *hardware(timings),
        ("CPU seconds", number(seconds, ",.0f", rule="sum")),
    )


def hardware(nodes: Sequence[Node]) -> Provenance:
    """Processor, threads, torch and commit of files that have ``hardware`` and ``commit``."""
    places = ("hardware/processor", "hardware/threads", "hardware/torch", "commit")
    return tuple((place.rpartition("/")[2], different(nodes, place, "")) for place in places)


def seeds(nodes: Iterable[Node], place: str = "seed") -> tuple[str, Cell]:
    """Those of runs, each once."""
    return "seeds", different(nodes, place, "d")


def different(nodes: Iterable[Node], place: str, spec: str) -> Cell:
    """All values that lie at ``place`` in the nodes, each once."""
    return number([node.at(place) for node in nodes], spec, rule="set")
