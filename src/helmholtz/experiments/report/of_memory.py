"""Sections: what a Hopfield memory holds, learning one map after another, and what the equilibrium model learns."""

from collections.abc import Sequence

from helmholtz.experiments.continual.study import JOINT, METHODS
from helmholtz.experiments.equilibrium.study import MEASURES
from helmholtz.experiments.report import parts
from helmholtz.experiments.report.charts import Curve, line_chart
from helmholtz.experiments.report.nodes import Node, by, grouped, label, number, ordered

BY_SEED = "Means and deviations over seeds"


@parts.section(
    "Memory: how many patterns are recalled",
    "How many random patterns does the memory tell apart as its margin falls? The margin says by how many nats the "
    "pattern that is told apart worst outweighs all others at its own place; below three the memory warns.",
    "helmholtz study recall run --profile full --train_steps 1500 --output docs/experiments/recall\n"
    "helmholtz study recall run --profile capacity --trials 1024 --output docs/experiments/recall",
    "recall",
    find=parts.run_nodes,
)
def recall(nodes: Sequence[Node]) -> parts.Found:
    rows = [node["result"] for node in nodes if node.at("settings/part").value == "patterns"]
    noisy = _most_trials([row for row in rows if row.at("corruption/kind").value == "noise"])
    levels = sorted(grouped(noisy, by("corruption/level")))
    return parts.Found(
        [_recall_table(noisy, levels)],
        [_capacity_figure(noisy, level) for level in levels if level > 0],
        parts.queue_provenance(nodes),
        ["One seed, five sets of patterns each; spread over sets is not kept."],
    )


def _most_trials(rows: Sequence[Node]) -> list[Node]:
    """Of settings that were measured twice, the measurement of more trials."""
    places = ("d_model", "n_patterns", "corruption/level")
    groups = grouped(rows, lambda row: tuple(row.at(place).value for place in places))
    return [max(same, key=by("n_trials")) for same in groups.values()]


def _recall_table(rows: Sequence[Node], levels: Sequence[float]) -> parts.Table:
    sizes = grouped(rows, lambda row: (row["d_model"].value, row["n_patterns"].value))
    named = [(f"D = {width}, K = {count:,}", same) for (width, count), same in sorted(sizes.items())]
    columns = {"margin, nats": parts.column("margin", ".2f", only=0)}
    for level in levels:
        at_level = ("corruption/level", level)
        columns[f"recalled at noise {level:g}"] = parts.column("accuracy", ".3f", where=at_level)
    caption = "Fraction of patterns recalled; noise in norms of the pattern"
    return parts.table(caption, "width, patterns", named, columns)


def _capacity_figure(rows: Sequence[Node], level: float) -> parts.Figure:
    curves = []
    widths = grouped([row for row in rows if row.at("corruption/level").value == level], by("d_model"))
    for place, (width, same) in enumerate(sorted(widths.items())):
        same.sort(key=by("margin"))
        margins = [row["margin"].value for row in same]
        for measure, words, style in (("accuracy", "memory", "o-"), ("nearest", "nearest neighbour", "--")):
            heights = [row[measure].value for row in same]
            curves.append(Curve(f"D = {width}, {words}", margins, heights, style, place))
    curves.append(Curve("the memory warns below", [3.0, 3.0], [0.0, 1.0], ":", 8))
    axis = "margin, nats (more patterns to the left)"
    chart = line_chart(curves, x=axis, y="recalled", title=f"noise {level:g}")
    return parts.Figure(f"Capacity: recall against the smallest margin at noise {level:g}.", chart)


@parts.section(
    "Memory: one map after another",
    "Maps over shared inputs and labels, learned in turn: what is left of the earlier ones at the end?",
    "helmholtz study continual run --seeds 0 1 2 3 4 5 --output docs/experiments/continual",
    "continual",
    find=parts.run_nodes,
)
def continual(nodes: Sequence[Node]) -> parts.Found:
    by_method = ordered(grouped(nodes, by("settings/method")), METHODS)
    joint = [value for run in by_method.pop(JOINT, []) for value in run.at("result/accuracies")]
    runs = [(method, [run["result"] for run in same]) for method, same in by_method.items()]
    columns = {
        "accuracy at the end": parts.column("accuracy", ".3f"),
        "forgetting": parts.column("forgetting", ".3f"),
        "backward": parts.column("backward_transfer", ".3f"),
        "forward": parts.column("forward_transfer", ".3f"),
        "each when new": parts.column("diagonal", ".3f"),
        "bytes of memory": parts.column("memory_bytes", ",.0f"),
    }
    found = parts.table(BY_SEED, "run", runs, columns)
    last = (label(JOINT), number(joint, ".3f"), *[label("")] * 5)
    return parts.Found(
        [parts.Table(found.caption, found.columns, (*found.rows, last))],
        [
            parts.dots(
                "What is left, a mark per seed.", runs, "accuracy", x="accuracy over all maps at the end"
            )
        ],
        parts.queue_provenance(nodes),
    )


@parts.section(
    "Mamba-Hopfield: what training finds",
    "Does the equilibrium model learn, do its equilibria stay cheap and stable, and what does each term of its "
    "objective do?",
    "helmholtz study equilibrium run --seeds 0 1 2 3 4 5 --output docs/experiments/equilibrium",
    "equilibrium",
    find=parts.run_nodes,
)
def learning(nodes: Sequence[Node]) -> parts.Found:
    tasks = grouped(nodes, by("settings/task"))
    rows = [
        (f"{task}: {words}", (tasks[task], name, spec))
        for task, measures in MEASURES.items()
        if task in tasks
        for name, words, spec in measures
    ]
    value = {"value": lambda row: number([cell["result"][row[1]] for cell in row[0]], row[2])}
    figures = []
    if "stability" in tasks:
        results = [
            (words, [cell["result"][name] for cell in tasks["stability"]])
            for name, words, _ in MEASURES["stability"]
        ]
        axis = "local Lipschitz constant of the map (below one: contracting)"
        figures.append(
            parts.dots("The stability term contracts the map, a mark per seed.", results, "", x=axis)
        )
    return parts.Found(
        [parts.table(BY_SEED, "task: measure", rows, value)],
        figures,
        parts.queue_provenance(nodes),
        [f"No results of the task {task}." for task in MEASURES if task not in tasks],
    )
