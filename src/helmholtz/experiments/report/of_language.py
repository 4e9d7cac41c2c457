"""Sections: language models at matched parameters, and how they scale."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helmholtz.experiments.language.models import LANGUAGE_MODELS
from helmholtz.experiments.language.run import LanguageStudy, language_runs
from helmholtz.experiments.report.charts import Curve, line_chart
from helmholtz.experiments.report.nodes import Node, grouped, label, number, ordered, read_node
from helmholtz.experiments.report.section import (
    Figure,
    Section,
    Table,
    absent,
    incomplete,
    locate_queue,
    queue_nodes,
    queue_provenance,
    timing,
)

LANGUAGE = "Language modelling at matched parameters"
LANGUAGE_ASKED = (
    "Six models of equal parameters, tokens and schedule, on two texts, by bytes and by BPE. The Free "
    "Transformer's number is an upper bound. Curves are means over seeds, against training tokens and against CPU "
    "seconds of one core."
)
COMMAND = "helmholtz study language run --output docs/experiments/language"
SCALING = "Language modelling: three sizes"
SCALING_ASKED = (
    "How much does a tenfold number of parameters buy at equal tokens, on Shakespeare by bytes? The slope is of the "
    "least-squares line through all seeds, with its standard error."
)


def language(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "language")
    if folder is None:
        return absent("language", LANGUAGE, LANGUAGE_ASKED, COMMAND, "language/results")
    nodes = [node for node in queue_nodes(folder) if node["settings"]["size"].value == "m"]
    tables, figures = [], []
    for name, runs in grouped(nodes, lambda node: _text(node["settings"].value)).items():
        models = by_model(runs)
        tables.append(_quality_table(name, models))
        figures += _curves(name, models)
    grid = [run.settings for run in language_runs(LanguageStudy()) if run.settings["size"] == "m"]
    missing = incomplete((_text(node["settings"].value) for node in nodes), Counter(map(_text, grid)))
    return Section(
        "language", LANGUAGE, LANGUAGE_ASKED, COMMAND, tuple(tables), tuple(figures), queue_provenance(nodes),
        missing,
    )  # fmt: skip


def _text(settings: Mapping[str, Any]) -> str:
    return f"{settings['corpus'].replace('_', ' ')}, {settings['tokenizer']}"


def by_model(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    return ordered(grouped(nodes, lambda node: node["settings"]["model"].value), LANGUAGE_MODELS)


def _quality_table(name: str, models: dict[str, list[Node]]) -> Table:
    lines = []
    for model, runs in models.items():
        bound = runs[0]["result"]["kind"].value == "bound"
        seconds = [time["cpu_seconds"][-1] for time in _times(runs)]
        lines.append(
            (
                label(model.replace("_", " ")),
                number(runs[0]["result"]["parameters"], ",d"),
                number([r["result"]["bits_per_byte"] for r in runs], ".3f", prefix="≤ " if bound else ""),
                number(seconds, ",.1f"),
            )
        )
    columns = ("model", "parameters", "validation bits/byte", "CPU seconds of training steps")
    return Table(name, columns, tuple(lines))


def _times(runs: Sequence[Node]) -> list[Node]:
    return [times for run in runs if (times := timing(run, "curve")) is not None]


def _curves(name: str, models: dict[str, list[Node]]) -> list[Figure]:
    by_tokens, by_seconds = [], []
    for place, (model, runs) in enumerate(models.items()):
        curves = [run["result"]["curve"].value for run in runs]
        losses = _means([[point["bits_per_byte"] for point in curve] for curve in curves])
        tokens = [point["tokens"] for point in curves[0]]
        by_tokens.append(Curve(model.replace("_", " "), tokens, losses, "o-", place))
        times = _times(runs)
        if len(times) == len(runs):
            seconds = _means([time["cpu_seconds"].value for time in times])
            by_seconds.append(Curve(model.replace("_", " "), seconds, losses, "o-", place))
    return [
        Figure(f"{name}: {words}", line_chart(curves, x=axis, y="bits per byte", log_x=True))
        for curves, words, axis in (
            (by_tokens, "loss against tokens", "training tokens"),
            (by_seconds, "loss against time", "CPU seconds"),
        )
        if curves
    ]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def scaling(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "language")
    file = None if folder is None else folder / "scaling.json"
    if folder is None or file is None or not file.exists():
        return absent("scaling", SCALING, SCALING_ASKED, COMMAND, "language/scaling.json")
    fits = read_node(file)["fits"]
    models = {fit["model"].value for fit in fits}
    nodes = [
        node for node in queue_nodes(folder)
        if (s := node["settings"])["corpus"].value == "shakespeare" and s["tokenizer"].value == "bytes"
        and s["model"].value in models
    ]  # fmt: skip
    sizes = sorted(grouped(nodes, lambda node: node["settings"]["size"].value).items(), key=_parameters)
    lines, curves = [], []
    for place, fit in enumerate(fits):
        own = [by_model(runs).get(fit["model"].value, []) for _, runs in sizes]
        lines.append(
            (
                label(fit["model"].value.replace("_", " ")),
                *(number([run["result"]["bits_per_byte"] for run in runs], ".3f") for runs in own),
                number(fit["slope"], ".3f"),
                number(fit["standard_error"], ".3f"),
            )
        )
        points = [run["result"] for runs in own for run in runs]
        x, y = ([point[key].value for point in points] for key in ("parameters", "bits_per_byte"))
        curves.append(Curve(fit["model"].value.replace("_", " "), x, y, "o", place))
        curves.append(Curve("", [min(x), max(x)], _line(x, y, fit["slope"].value), "-", place))
    columns = ("model", *(f"{name}: about {_round(runs)} parameters" for name, runs in sizes),
               "bits/byte per tenfold", "standard error")  # fmt: skip
    chart = line_chart(curves, x="parameters", y="bits per byte", log_x=True)
    return Section(
        "scaling", SCALING, SCALING_ASKED, COMMAND, (Table("Validation bits per byte by size", columns, tuple(lines)),),
        (Figure("Points are runs, lines the fits.", chart),), queue_provenance(nodes),
    )  # fmt: skip


def _parameters(item: tuple[str, list[Node]]) -> int:
    return int(item[1][0]["result"]["parameters"].value)


def _round(runs: Sequence[Node]) -> str:
    return f"{runs[0]['result']['parameters'].value / 1e6:.2f} M"


def _line(x: Sequence[float], y: Sequence[float], slope: float) -> list[float]:
    """Heights at both ends of the line of this slope through the centre of the points (in the logarithm of x)."""
    logs = [math.log10(value) for value in x]
    centre, height = sum(logs) / len(logs), sum(y) / len(y)
    return [height + slope * (end - centre) for end in (min(logs), max(logs))]
