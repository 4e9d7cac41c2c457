"""Sections: language models at matched parameters, and how they scale."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from helmholtz.experiments.language.models import LANGUAGE_MODELS
from helmholtz.experiments.language.run import LanguageStudy, language_runs
from helmholtz.experiments.report import parts
from helmholtz.experiments.report.charts import Curve, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, by, grouped, number, ordered, read_node

COMMAND = "helmholtz study language run --output docs/experiments/language"


@parts.section(
    "Language modelling at matched parameters",
    "Six models of equal parameters, tokens and schedule, on two texts, by bytes and by BPE. The Free Transformer's "
    "number is an upper bound. Curves are means over seeds, against training tokens and against CPU seconds of one "
    "core.",
    COMMAND,
    "language",
    find=parts.run_nodes,
)
def language(runs: Sequence[Node]) -> parts.Found:
    nodes = [node for node in runs if node.at("settings/size").value == "m"]
    texts = {
        name: by_model(runs)
        for name, runs in grouped(nodes, lambda node: _text(node["settings"].value)).items()
    }
    columns = {
        "parameters": parts.column("result/parameters", ",d", only=0),
        "validation bits/byte": quality,
        "CPU seconds of training steps": lambda runs: number(
            [time["cpu_seconds"][-1] for time in _times(runs)], ",.1f"
        ),
    }
    grid = [run.settings for run in language_runs(LanguageStudy()) if run.settings["size"] == "m"]
    return parts.Found(
        [parts.table(name, "model", models.items(), columns) for name, models in texts.items()],
        [figure for name, models in texts.items() for figure in _curves(name, models)],
        parts.queue_provenance(nodes),
        parts.incomplete((_text(node["settings"].value) for node in nodes), Counter(map(_text, grid))),
    )


def _text(settings: Mapping[str, Any]) -> str:
    return f"{settings['corpus'].replace('_', ' ')}, {settings['tokenizer']}"


def by_model(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """In the order of the study."""
    groups = ordered(grouped(nodes, by("settings/model")), LANGUAGE_MODELS)
    return {name.replace("_", " "): runs for name, runs in groups.items()}


def quality(runs: Sequence[Node]) -> Cell:
    """Bits per byte; of a model with a plan an upper bound."""
    is_bound = runs[0].at("result/kind").value == "bound"
    found = [run.at("result/bits_per_byte") for run in runs]
    return number(found, ".3f", prefix="≤ " if is_bound else "")


def _times(runs: Sequence[Node]) -> list[Node]:
    return [times for run in runs if (times := parts.timing(run, "curve")) is not None]


def _curves(name: str, models: dict[str, list[Node]]) -> list[parts.Figure]:
    by_tokens, by_seconds = [], []
    for place, (model, runs) in enumerate(models.items()):
        curves = [run.at("result/curve").value for run in runs]
        losses = _means([[point["bits_per_byte"] for point in curve] for curve in curves])
        by_tokens.append(Curve(model, [point["tokens"] for point in curves[0]], losses, "o-", place))
        times = _times(runs)
        if len(times) == len(runs):
            seconds = _means([time["cpu_seconds"].value for time in times])
            by_seconds.append(Curve(model, seconds, losses, "o-", place))
    return [
        parts.Figure(f"{name}: {words}", line_chart(curves, x=axis, y="bits per byte", log_x=True))
        for curves, words, axis in (
            (by_tokens, "loss against tokens", "training tokens"),
            (by_seconds, "loss against time", "CPU seconds"),
        )
        if curves
    ]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _scaling_folder(folders: Sequence[Path], file: str) -> Path | None:
    folder = parts.locate_queue(folders, "language")
    return folder if folder is not None and (folder / "scaling.json").exists() else None


@parts.section(
    "Language modelling: three sizes",
    "How much does a tenfold number of parameters buy at equal tokens, on Shakespeare by bytes? The slope is of the "
    "least-squares line through all seeds, with its standard error.",
    COMMAND,
    "language/scaling.json",
    find=_scaling_folder,
)
def scaling(folder: Path) -> parts.Found:
    fits = {_spoken(fit["model"]): fit for fit in read_node(folder / "scaling.json")["fits"]}
    nodes = [
        node
        for node in parts.queue_nodes(folder)
        if _text(node["settings"].value) == "shakespeare, bytes"
        and _spoken(node.at("settings/model")) in fits
    ]
    sizes = sorted(grouped(nodes, by("settings/size")).items(), key=lambda size: _parameters(size[1]))
    runs = {model: [run for _, same in sizes for run in by_model(same).get(model, [])] for model in fits}
    columns: dict[str, parts.Column] = {
        f"{name}: about {_parameters(same) / 1e6:.2f} M parameters": parts.column(
            "result/bits_per_byte", ".3f", where=("settings/size", name)
        )
        for name, same in sizes
    }

    def fitted(runs: Sequence[Node], key: str) -> Cell:
        return number(fits[_spoken(runs[0].at("settings/model"))][key], ".3f")

    columns["bits/byte per tenfold"] = partial(fitted, key="slope")
    columns["standard error"] = partial(fitted, key="standard_error")
    curves = []
    for place, (model, fit) in enumerate(fits.items()):
        points = [run["result"] for run in runs[model]]
        x, y = ([point[key].value for point in points] for key in ("parameters", "bits_per_byte"))
        curves.append(Curve(model, x, y, "o", place))
        curves.append(Curve("", [min(x), max(x)], _line(x, y, fit["slope"].value), "-", place))
    chart = line_chart(curves, x="parameters", y="bits per byte", log_x=True)
    return parts.Found(
        [parts.table("Validation bits per byte by size", "model", runs.items(), columns)],
        [parts.Figure("Points are runs, lines the fits.", chart)],
        parts.queue_provenance(nodes),
    )


def _spoken(name: Node) -> str:
    return str(name.value).replace("_", " ")


def _parameters(runs: Sequence[Node]) -> int:
    return int(runs[0].at("result/parameters").value)


def _line(x: Sequence[float], y: Sequence[float], slope: float) -> list[float]:
    """Heights at both ends of the line of this slope through the centre of the points (in the logarithm of x)."""
    logs = [math.log10(value) for value in x]
    centre, height = sum(logs) / len(logs), sum(y) / len(y)
    return [height + slope * (end - centre) for end in (min(logs), max(logs))]
