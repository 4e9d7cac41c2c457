"""Sections: faults that lose nothing, and speed."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.report import parts
from helmholtz.experiments.report.nodes import Node, number

SPEED_TABLES: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str, str], ...]]] = {
    "layers_speed": (
        "Mixers beside attention, forward and backward", ("mixer", "dtype", "B", "T"),
        (("milliseconds", "ms", ".0f"), ("attention_milliseconds", "attention, ms", ".0f"), ("ratio", "ratio", ".2f")),
    ),
    "layers_decode": (
        "Microseconds per decoded token after so many", ("mixer",),
        tuple((f"microseconds_at_{n}", f"{n:,}", ",.0f") for n in (64, 1024, 4096)),
    ),
    "kernels": (
        "Native kernels, forward and backward", ("op", "dtype"),
        (("ms", "ms", ".2f"), ("to_floor", "of the floor", ".1f"),
         ("plain_to_kernel", "times the plain form's speed", ".1f")),
    ),
    "mad": (
        "Training of the MAD study", ("model", "task"),
        (("training_ms", "step, ms", ".0f"), ("to_attention", "of attention", ".2f")),
    ),
    "layers_growth": (
        "Growth with the length", ("mixer", "T"),
        (("microseconds_per_token", "microseconds per token", ",.0f"),
         ("peak_bytes_per_token", "peak bytes per token", ",.0f"),
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
    "architectures": (
        "The demo's models", ("model",),
        (("training_ms", "training step, ms", ".0f"), ("train_tokens_per_s", "tokens/s", ",.0f"),
         ("train_tokens_per_s_ratio", "training, times 252ba62", ".2f"),
         ("decode_tokens_per_s", "decoded tokens/s", ",.0f"),
         ("decode_tokens_per_s_ratio", "decoding, times 252ba62", ".2f")),
    ),
}  # fmt: skip
"""By file: caption, what names a row, and measures with their words and formats."""


@parts.section(
    "Faults",
    "Does a training run that is killed, starved or damaged lose anything, and does it go on exactly?",
    "python tests/faults/matrix.py --kills 120 --pair-kills 8 --seed 0 --output docs/experiments/faults/matrix.json",
    "faults/matrix.json",
    find=parts.file_node,
)
def faults(content: Node) -> parts.Found:
    rows = [(row["fault"].value, [row]) for row in content["rows"]]
    columns = {
        "processes": parts.column("processes", "d"),
        "trials": parts.column("trials", "d"),
        "nothing lost": parts.column("nothing_lost", ""),
        "went on exactly": parts.column("resumed_equal", ""),
    }
    counts = (
        ("kill points", number(content["kill_points"], "d")),
        ("seconds", number(content["seconds"], ",d")),
    )
    done = parts.table("What was done to runs", "fault", rows, columns)
    return parts.Found([done], provenance=(*counts, *parts.hardware([content])))


def _speed_files(folders: Sequence[Path], where: str) -> dict[str, Node] | None:
    files = {name: parts.file_node(folders, f"{name}.json", f"results/{name}.json") for name in SPEED_TABLES}
    return {name: node for name, node in files.items() if node is not None} or None


@parts.section(
    "Speed and memory",
    "What do the layers and models cost beside attention and beside each other?",
    "python tools/measure.py --renew",
    "benchmarks/results/*.json",
    find=_speed_files,
)
def speed(found: dict[str, Node]) -> parts.Found:
    figures = []
    if "layers_speed" in found:
        ratios = [
            (_row_name(row, ("mixer", "dtype", "B", "T")), [row]) for row in found["layers_speed"]["rows"]
        ]
        figures.append(
            parts.dots("Time of a mixer over that of attention of equal size.", ratios, "ratio", x="ratio")
        )
    names = {"hardware": "processors", "threads": "threads", "torch": "torch", "commit": "commits"}
    environments = [content["environment"] for content in found.values()]
    return parts.Found(
        [_speed_table(name, content) for name, content in found.items()],
        figures,
        tuple((words, parts.different(environments, key, "")) for key, words in names.items()),
        [f"No {name}.json." for name in SPEED_TABLES if name not in found],
    )


def _speed_table(name: str, content: Node) -> parts.Table:
    caption, keys, measures = SPEED_TABLES[name]
    needed = {*keys, *(key for key, _, _ in measures)}
    rows = [(_row_name(row, keys), row) for row in content["rows"] if row.value.keys() >= needed]
    columns = {words: lambda row, key=key, spec=spec: number(row[key], spec) for key, words, spec in measures}
    return parts.table(caption, ", ".join(keys), rows, columns)


def _row_name(row: Node, keys: Sequence[str]) -> str:
    first, *rest = keys
    named = first in ("mixer", "model", "op")
    parts = [str(row[first].value).replace("_", " ")] if named else [f"{first} = {row[first].value:,}"]
    return ", ".join(parts + [_named(key, row[key].value) for key in rest])


def _named(key: str, value: str | int) -> str:
    return value if isinstance(value, str) else f"{key} = {value:,}"
