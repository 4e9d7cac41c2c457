"""Sections: faults that lose nothing, and speed."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.report.charts import dot_chart
from helmholtz.experiments.report.nodes import Cell, Node, label, number, read_node
from helmholtz.experiments.report.section import Figure, Section, Table, absent, hardware, locate

FAULTS = "Faults"
FAULTS_ASKED = (
    "Does a training run that is killed, starved or damaged lose anything, and does it go on exactly?"
)
FAULTS_COMMAND = (
    "python tests/faults/matrix.py --kills 120 --pair-kills 8 --seed 0 "
    "--output docs/experiments/faults/matrix.json"
)
SPEED = "Speed and memory"
SPEED_ASKED = "What do the layers and models cost beside attention and beside each other?"
SPEED_COMMAND = "make bench"
SPEED_TABLES: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str, str], ...]]] = {
    "layers_speed": (
        "Mixers beside attention, forward and backward", ("mixer", "B", "T"),
        (("milliseconds", "ms", ".0f"), ("attention_milliseconds", "attention, ms", ".0f"), ("ratio", "ratio", ".2f")),
    ),
    "layers_decode": (
        "Microseconds per decoded token after so many", ("mixer",),
        tuple((f"microseconds_at_{n}", f"{n:,}", ",.0f") for n in (64, 1024, 4096, 16384)),
    ),
    "layers_growth": (
        "Growth with the length", ("mixer", "T"),
        (("microseconds_per_token", "microseconds per token", ",.0f"),
         ("peak_bytes_per_token", "peak bytes per token", ",d"),
         ("state_bytes", "bytes of state", ",d")),
    ),
    "free_transformer": (
        "The Free Transformer", ("model",),
        (("train_ms", "training step, ms", ".0f"), ("train_to_decoder", "over the decoder", ".2f"),
         ("decode_ms", "ms per decoded token", ".2f"), ("decode_to_decoder", "over the decoder's", ".2f")),
    ),
    "mamba_hopfield": (
        "Mamba-Hopfield and its solvers", ("model",),
        (("forward_backward_s", "forward and backward, s", ".2f"), ("tokens_per_s", "tokens/s", ",.0f"),
         ("steps", "steps", ".2f"), ("evaluations", "evaluations", ".2f")),
    ),
    "ssd": (
        "State-space duality", ("B", "T", "N"),
        (("ms", "ms", ".1f"), ("loop ms", "loop, ms", ".0f"), ("loop / ssd", "ratio", ".1f")),
    ),
    "recurrences": (
        "Recurrences", ("op", "B", "T"),
        (("ms", "ms", ".1f"), ("us/token", "microseconds per token", ".2f"), ("of loop", "of a loop", ".2f"),
         ("of softmax", "of softmax attention", ".2f")),
    ),
}  # fmt: skip
"""By file: caption, what names a row, and measures with their words and formats."""


def faults(folders: Sequence[Path]) -> Section:
    file = locate(folders, "faults/matrix.json")
    if file is None:
        return absent("faults", FAULTS, FAULTS_ASKED, FAULTS_COMMAND, "faults/matrix.json")
    content = read_node(file)
    lines = [
        (label(row["fault"].value), number(row["processes"], "d"), number(row["trials"], "d"),
         number(row["nothing_lost"], ""), number(row["resumed_equal"], ""))
        for row in content["rows"]
    ]  # fmt: skip
    columns = ("fault", "processes", "trials", "nothing lost", "went on exactly")
    table = Table("What was done to runs", columns, tuple(lines))
    provenance = (
        ("kill points", number(content["kill_points"], "d")),
        ("seconds", number(content["seconds"], ",d")),
        *hardware([content]),
    )
    return Section("faults", FAULTS, FAULTS_ASKED, FAULTS_COMMAND, (table,), (), provenance)


def speed(folders: Sequence[Path]) -> Section:
    files = {name: locate(folders, f"{name}.json", f"results/{name}.json") for name in SPEED_TABLES}
    found = {name: read_node(file) for name, file in files.items() if file is not None}
    if not found:
        return absent("speed", SPEED, SPEED_ASKED, SPEED_COMMAND, "benchmarks/results/*.json")
    environments = [content["environment"] for content in found.values()]
    provenance: tuple[tuple[str, Cell], ...] = tuple(
        (words, number([environment[key] for environment in environments], "", rule="set"))
        for key, words in (
            ("hardware", "processors"),
            ("threads", "threads"),
            ("torch", "torch"),
            ("commit", "commits"),
        )
    )
    figures = (_ratio_figure(found["layers_speed"]),) if "layers_speed" in found else ()
    missing = tuple(f"No {name}.json." for name in SPEED_TABLES if name not in found)
    tables = tuple(_speed_table(name, content) for name, content in found.items())
    return Section("speed", SPEED, SPEED_ASKED, SPEED_COMMAND, tables, figures, provenance, missing)


def _speed_table(name: str, content: Node) -> Table:
    caption, keys, measures = SPEED_TABLES[name]
    lines = [
        (label(_row_name(row, keys)), *(number(row[key], spec) for key, _, spec in measures))
        for row in content["rows"]
        if all(key in row.value for key in (*keys, *(measure[0] for measure in measures)))
    ]
    return Table(caption, (", ".join(keys), *(words for _, words, _ in measures)), tuple(lines))


def _row_name(row: Node, keys: Sequence[str]) -> str:
    first, *rest = keys
    named = first in ("mixer", "model", "op")
    parts = [str(row[first].value).replace("_", " ")] if named else [f"{first} = {row[first].value:,}"]
    return ", ".join(parts + [f"{key} = {row[key].value:,}" for key in rest])


def _ratio_figure(content: Node) -> Figure:
    rows = [(_row_name(row, ("mixer", "B", "T")), [row["ratio"].value]) for row in content["rows"]]
    return Figure("Time of a mixer over that of attention of equal size.", dot_chart(rows, x="ratio"))
