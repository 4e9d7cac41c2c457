"""Section: channel-wise selection."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.report.charts import Curve, dot_chart, heat_charts, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, grouped, label, number, ordered
from helmholtz.experiments.report.section import (
    Figure,
    Section,
    Table,
    absent,
    locate_queue,
    queue_nodes,
    queue_provenance,
)
from helmholtz.experiments.selection.run import MAXIMUM_READERS, NAMED_READERS

TITLE = "Channel-wise selection"
ASKED = (
    "Can every channel of a read take its own token from a lossless cache? First the gap between a read "
    "and the channel's maximum, beside its law; then layers of equal parameters that learn it; then how "
    "many patterns a layer reaches."
)
COMMAND = "helmholtz study selection run --output docs/experiments/selection"
SHOWN = ("attention, values fixed", "free energy, beta 2", "free energy, beta 20")


def selection(folders: Sequence[Path]) -> Section:
    folder = locate_queue(folders, "selection")
    if folder is None:
        return absent("selection", TITLE, ASKED, COMMAND, "selection/results")
    nodes = queue_nodes(folder)
    parts = grouped(nodes, lambda node: node["settings"]["part"].value)
    gaps, learned = parts.get("gaps", []), parts.get("learned", [])
    targets = grouped(learned, lambda node: node["settings"]["task"]["target"].value)
    largest = by_label(targets.get("maximum", []))
    named = by_label(targets.get("named", []))
    tables, figures = [], []
    if gaps:
        tables.append(_gap_table(gaps))
        figures.append(_gap_figure(gaps))
    if largest:
        tables.append(_learned_table("One trained layer, every channel's maximum", largest))
        figures.append(_error_figure(largest))
        figures += _read_figures(largest)
    if named:
        tables.append(_learned_table("One trained layer, a token named for every channel", named))
    if parts.get("patterns"):
        tables.append(_pattern_table(parts["patterns"]))
    missing = [
        f"The part {part} has not been computed."
        for part in ("gaps", "learned", "patterns")
        if part not in parts
    ]
    provenance = queue_provenance(nodes)
    return Section(
        "selection", TITLE, ASKED, COMMAND, tuple(tables), tuple(figures), provenance, tuple(missing)
    )


def by_label(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    groups = grouped(nodes, lambda node: node["settings"]["label"].value)
    return ordered(groups, (*MAXIMUM_READERS, *NAMED_READERS))


def _rows(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """Rows of equal place in every file."""
    return list(zip(*(node["result"]["rows"] for node in nodes), strict=True))


def _gap_table(nodes: Sequence[Node]) -> Table:
    by_beta = grouped(_rows(nodes), lambda same: same[0]["beta"].value)
    lines = []
    for beta, reads in by_beta.items():
        cells = [cell for same in reads for cell in (_gap(same), number(same[0]["law"], ".4f"))]
        cells += [label("")] * (6 - len(cells))
        name = f"free energy, beta {beta:g}" if beta else "mean (attention)"
        lines.append((label(name), number(reads[0][0]["bound"], ".4f"), *cells))
    columns = ("read", "bound ln n / beta", "measured", "law", "clipped at 40", "law", "clipped at 80", "law")
    caption = "Gap to the channel's maximum under a uniform prior (values of deviation one), clipped and not"
    return Table(caption, columns, tuple(lines))


def _gap(same: Sequence[Node]) -> Cell:
    return number([row["gap"] for row in same], ".4f")


def _gap_figure(nodes: Sequence[Node]) -> Figure:
    curves = []
    same = [rows[0] for rows in _rows(nodes)]
    for place, cap in enumerate((None, 80.0, 40.0)):
        rows = [row for row in same if row["beta"].value and row["cap"].value == cap]
        name = "nothing clipped" if cap is None else f"clipped at {cap:g}"
        betas = [row["beta"].value for row in rows]
        curves.append(Curve(f"law, {name}", betas, [row["law"].value for row in rows], "-", place))
        curves.append(Curve(f"measured, {name}", betas, [row["gap"].value for row in rows], "o", place))
    betas = [row["beta"].value for row in same if row["cap"].value is None and row["beta"].value]
    curves.append(Curve("attention", betas, [same[0]["gap"].value] * len(betas), "--", 8))
    chart = line_chart(
        curves, x="beta per standard deviation", y="gap to the maximum", log_x=True, log_y=True
    )
    return Figure("The gap falls as the law says, until the exponent is clipped.", chart)


def _learned_table(caption: str, readers: dict[str, list[Node]]) -> Table:
    rows = []
    for name, nodes in readers.items():
        results = [node["result"] for node in nodes]
        rows.append(
            (
                label(name),
                number(results[0]["parameters"], ",d"),
                number([result["rms_error"] for result in results], ".3f"),
                number([result["explained"] for result in results], ".3f"),
                number([result["selected"] for result in results], ".1%"),
                number([result["sharpness"] for result in results], ".2f"),
            )
        )
    columns = (
        "layer",
        "parameters",
        "rms error",
        "variance explained",
        "channels on their token",
        "sharpness",
    )
    return Table(caption, columns, tuple(rows))


def _error_figure(readers: dict[str, list[Node]]) -> Figure:
    rows = [(name, [node["result"]["rms_error"].value for node in nodes]) for name, nodes in readers.items()]
    return Figure(
        "Error of trained layers, a mark per seed.", dot_chart(rows, x="rms error, log scale", log_x=True)
    )


def _read_figures(readers: dict[str, list[Node]]) -> list[Figure]:
    examples = [(name, readers[name][0]["result"]["example"].value) for name in SHOWN if name in readers]
    if not examples:
        return []
    panels = [(name, example["influence"]) for name, example in examples]
    chart = heat_charts(panels, x="token", y="channel", marks=[example["token"] for _, example in examples])
    return [
        Figure("Which token each channel reads (share of its gradient); circles: the token it should.", chart)
    ]


def _pattern_table(nodes: Sequence[Node]) -> Table:
    rows = []
    for same in _rows(nodes):
        sizes = [same[0][name].value for name in ("n_tokens", "n_heads", "n_channels")]
        rows.append(
            (
                label("t = {}, H = {}, D = {}".format(*sizes)),
                number([row["attention"] for row in same], ",d", rule="set"),
                number(same[0]["by_heads"], ",d"),
                number([row["free_energy"] for row in same], ",d", rule="set"),
                number(same[0]["by_channels"], ",d"),
            )
        )
    columns = ("tokens, heads, channels", "attention reached", "t^H", "free energy reached", "t^D")
    return Table(
        "Patterns of largest weights that one random layer reaches (all seeds)", columns, tuple(rows)
    )
