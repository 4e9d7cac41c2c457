"""What a section of the report is made of, and where its files are looked for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helmholtz.experiments.records import RESULTS, RUNS, TIMINGS, read_lines
from helmholtz.experiments.report.nodes import Cell, Node, label, number, read_node, shown


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


def queue_provenance(nodes: Sequence[Node]) -> tuple[tuple[str, Cell], ...]:
    """Of the runs of a queue: seeds from their settings, the rest from their timings."""
    timings = [times for node in nodes if (times := timing(node)) is not None and times.value]
    seeds = sorted((node["settings"]["seed"] for node in nodes), key=lambda node: node.value)
    places = dict.fromkeys(
        Path(node.file).parent if node.pointer == "" else Path(node.file) for node in nodes
    )
    return (
        ("runs", label(f"{len(nodes)} in {', '.join(place.as_posix() for place in places)}")),
        ("seeds", number(seeds, "d", rule="set")),
        *hardware(timings),
        ("CPU seconds", number([times["cpu_seconds"] for times in timings], ",.0f", rule="sum")),
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
