"""Section: channel-wise selection."""

from collections.abc import Sequence

from helmholtz.experiments.report import parts
from helmholtz.experiments.report.charts import Curve, heat_charts, line_chart
from helmholtz.experiments.report.nodes import Node, by, grouped, label, number, ordered
from helmholtz.experiments.selection.run import MAXIMUM_READERS, NAMED_READERS

SHOWN = ("attention, values fixed", "free energy, beta 2", "free energy, beta 20")
LEARNED = {
    "parameters": parts.column("parameters", ",d", only=0),
    "rms error": parts.column("rms_error", ".3f"),
    "variance explained": parts.column("explained", ".3f"),
    "channels on their token": parts.column("selected", ".1%"),
    "sharpness": parts.column("sharpness", ".2f"),
}
PATTERNS = {
    "attention reached": lambda rows: parts.different(rows, "attention", ",d"),
    "t^H": parts.column("by_heads", ",d", only=0),
    "free energy reached": lambda rows: parts.different(rows, "free_energy", ",d"),
    "t^D": parts.column("by_channels", ",d", only=0),
}


@parts.section(
    "Channel-wise selection",
    "Can every channel of a read take its own token from a lossless cache? First the gap between a read and the "
    "channel's maximum, beside its prediction; then layers of equal parameters that learn it; then how many patterns a "
    "layer reaches.",
    "helmholtz study selection run --output docs/experiments/selection",
    "selection",
    find=parts.run_nodes,
)
def selection(nodes: Sequence[Node]) -> parts.Found:
    computed = grouped(nodes, by("settings/part"))
    targets = grouped(computed.get("learned", []), by("settings/task/target"))
    largest, named = (by_label(targets.get(target, [])) for target in ("maximum", "named"))
    tables, figures = [], []
    if "gaps" in computed:
        tables.append(_gap_table(computed["gaps"]))
        figures.append(_gap_figure(computed["gaps"]))
    if largest:
        tables.append(
            parts.table("One trained layer, every channel's maximum", "layer", largest.items(), LEARNED)
        )
        caption = "Error of trained layers, a mark per seed."
        figures.append(
            parts.dots(caption, largest.items(), "rms_error", x="rms error, log scale", log_x=True)
        )
        figures += _read_figures(largest)
    if named:
        caption = "One trained layer, a token named for every channel"
        tables.append(parts.table(caption, "layer", named.items(), LEARNED))
    if "patterns" in computed:
        rows = [(_sizes(same[0]), same) for same in _rows(computed["patterns"])]
        caption = "Patterns of largest weights that one random layer reaches (all seeds)"
        tables.append(parts.table(caption, "tokens, heads, channels", rows, PATTERNS))
    wanted = ("gaps", "learned", "patterns")
    missing = [f"The part {part} has not been computed." for part in wanted if part not in computed]
    return parts.Found(tables, figures, parts.queue_provenance(nodes), missing)


def by_label(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """Results of trained layers by the layer."""
    groups = ordered(grouped(nodes, by("settings/label")), (*MAXIMUM_READERS, *NAMED_READERS))
    return {name: [node["result"] for node in group] for name, group in groups.items()}


def _rows(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """Rows of equal place in every file."""
    return list(zip(*(node.at("result/rows") for node in nodes), strict=True))


def _sizes(row: Node) -> str:
    sizes = {
        letter: row[name].value for letter, name in (("t", "n_tokens"), ("H", "n_heads"), ("D", "n_channels"))
    }
    return ", ".join(f"{letter} = {size}" for letter, size in sizes.items())


def _gap_table(nodes: Sequence[Node]) -> parts.Table:
    by_beta = grouped(_rows(nodes), lambda same: same[0]["beta"].value)
    lines = []
    for beta, measured in by_beta.items():
        cells = [
            cell
            for same in measured
            for cell in (number([row["gap"] for row in same], ".4f"), number(same[0]["law"], ".4f"))
        ]
        cells += [label("")] * (6 - len(cells))
        name = f"free energy, beta {beta:g}" if beta else "mean (attention)"
        lines.append((label(name), number(measured[0][0]["bound"], ".4f"), *cells))
    reads = ("measured", "predicted", "clipped at 40", "predicted", "clipped at 80", "predicted")
    caption = "Gap to the channel's maximum under a uniform prior (values of deviation one), clipped and not"
    return parts.Table(caption, ("read", "bound ln n / beta", *reads), tuple(lines))


def _gap_figure(nodes: Sequence[Node]) -> parts.Figure:
    curves = []
    same = [rows[0] for rows in _rows(nodes)]
    for place, cap in enumerate((None, 80.0, 40.0)):
        rows = [row for row in same if row["beta"].value and row["cap"].value == cap]
        name = "nothing clipped" if cap is None else f"clipped at {cap:g}"
        betas = [row["beta"].value for row in rows]
        curves.append(Curve(f"predicted, {name}", betas, [row["law"].value for row in rows], "-", place))
        curves.append(Curve(f"measured, {name}", betas, [row["gap"].value for row in rows], "o", place))
    betas = [row["beta"].value for row in same if row["cap"].value is None and row["beta"].value]
    curves.append(Curve("attention", betas, [same[0]["gap"].value] * len(betas), "--", 8))
    axes = {"x": "beta per standard deviation", "y": "gap to the maximum"}
    chart = line_chart(curves, **axes, log_x=True, log_y=True)
    return parts.Figure("The gap falls as predicted, until the exponent is clipped.", chart)


def _read_figures(readers: dict[str, list[Node]]) -> list[parts.Figure]:
    examples = [(name, readers[name][0]["example"].value) for name in SHOWN if name in readers]
    if not examples:
        return []
    panels = [(name, example["influence"]) for name, example in examples]
    chart = heat_charts(panels, x="token", y="channel", marks=[example["token"] for _, example in examples])
    return [
        parts.Figure(
            "Which token each channel reads (fraction of its gradient); circles: the token it should.", chart
        )
    ]
