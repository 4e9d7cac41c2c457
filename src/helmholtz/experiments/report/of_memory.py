"""Sections: what a Hopfield memory holds, learning one map after another, and what the equilibrium model learns."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.report.charts import Curve, dot_chart, line_chart
from helmholtz.experiments.report.nodes import Node, grouped, label, number, read_node
from helmholtz.experiments.report.section import Figure, Section, Table, absent, hardware, locate

RECALL = "Memory: how many patterns are recalled"
RECALL_ASKED = (
    "How many random patterns does the memory tell apart as its margin falls? The margin says by how many nats the "
    "pattern that is told apart worst outweighs all others at its own place; below three the memory warns."
)
RECALL_COMMAND = """helmholtz study recall run --profile full --train_steps 1500 --output docs/experiments/memory
helmholtz study recall run --profile capacity --trials 1024 --output docs/experiments/memory/capacity"""
CONTINUAL = "Memory: one map after another"
CONTINUAL_ASKED = (
    "Maps over shared inputs and labels, learned in turn: what is left of the earlier ones at the end?"
)
CONTINUAL_COMMAND = "helmholtz study continual run --seeds 0 1 2 3 4 5 --output docs/experiments/memory"
LEARNING = "Mamba-Hopfield: what training finds"
LEARNING_ASKED = (
    "Does the equilibrium model learn, do its equilibria stay cheap and stable, and what does "
    "each term of its objective do?"
)
LEARNING_COMMAND = "python examples/equilibrium_tasks.py"
LEARNING_ROWS = {
    "periods": (
        ("cross_entropy", "cross-entropy, nats", ".4f"),
        ("mean_steps", "solver steps, with the term on starts", ".2f"),
        ("mean_steps_without_term", "solver steps, without", ".2f"),
    ),
    "pairs": (
        ("accuracy", "recall of pairs in a context", ".1%"),
        ("accuracy_blocks_alone", "the same by the blocks alone", ".1%"),
    ),
    "bytes": (
        ("bits_per_character", "bits per character of a text", ".3f"),
        ("unigram_bits_per_character", "bits per character by frequencies alone", ".3f"),
        ("converged", "share of tokens converged", ".1%"),
    ),
    "stability": (
        ("before", "Lipschitz constant before training", ".2f"),
        ("after", "after, with the stability term", ".2f"),
        ("after_without_term", "after, without", ".2f"),
    ),
}
"""By task: measure, words, format."""


def recall(folders: Sequence[Path]) -> Section:
    files = [locate(folders, f"memory/{name}") for name in ("recall.json", "capacity/recall.json")]
    contents = [read_node(file) for file in files if file is not None]
    if not contents:
        return absent("recall", RECALL, RECALL_ASKED, RECALL_COMMAND, "memory/recall.json")
    rows = [row for content in contents for row in content["patterns"]]
    noisy = _first_of_each([row for row in rows if row["corruption"]["kind"].value == "noise"])
    levels = sorted({row["corruption"]["level"].value for row in noisy})
    seeds = number([content["seed"] for content in contents], "d", rule="set")
    return Section(
        "recall",
        RECALL,
        RECALL_ASKED,
        RECALL_COMMAND,
        (_recall_table(noisy, levels),),
        tuple(_capacity_figure(noisy, level) for level in levels if level > 0),
        (("seeds", seeds), *hardware(contents)),
        ("One seed, five sets of patterns each; spread over sets is not kept.",),
    )


def _first_of_each(rows: Sequence[Node]) -> list[Node]:
    """Of settings that were measured twice, the first."""
    groups = grouped(
        rows, lambda row: (row["d_model"].value, row["n_patterns"].value, row["corruption"]["level"].value)
    )
    return [same[0] for same in groups.values()]


def _recall_table(rows: Sequence[Node], levels: Sequence[float]) -> Table:
    sizes = grouped(rows, lambda row: (row["d_model"].value, row["n_patterns"].value))
    lines = []
    for (width, count), same in sorted(sizes.items()):
        by_level = {row["corruption"]["level"].value: row for row in same}
        cells = [
            number(by_level[level]["accuracy"], ".3f") if level in by_level else label("") for level in levels
        ]
        lines.append((label(f"D = {width}, K = {count:,}"), number(same[0]["margin"], ".2f"), *cells))
    columns = ("width, patterns", "margin, nats", *(f"recalled at noise {level:g}" for level in levels))
    return Table("Share of patterns recalled; noise in norms of the pattern", columns, tuple(lines))


def _capacity_figure(rows: Sequence[Node], level: float) -> Figure:
    curves = []
    chosen = [row for row in rows if row["corruption"]["level"].value == level]
    widths = grouped(chosen, lambda row: row["d_model"].value)
    for place, (width, same) in enumerate(sorted(widths.items())):
        same.sort(key=lambda row: row["margin"].value)
        margins = [row["margin"].value for row in same]
        curves.append(
            Curve(f"D = {width}, memory", margins, [row["accuracy"].value for row in same], "o-", place)
        )
        curves.append(
            Curve(
                f"D = {width}, nearest neighbour",
                margins,
                [row["nearest"].value for row in same],
                "--",
                place,
            )
        )
    curves.append(Curve("the memory warns below", [3.0, 3.0], [0.0, 1.0], ":", 8))
    chart = line_chart(
        curves, x="margin, nats (more patterns to the left)", y="recalled", title=f"noise {level:g}"
    )
    return Figure(f"Capacity: recall against the smallest margin at noise {level:g}.", chart)


def continual(folders: Sequence[Path]) -> Section:
    file = locate(folders, "memory/continual.json")
    if file is None:
        return absent("continual", CONTINUAL, CONTINUAL_ASKED, CONTINUAL_COMMAND, "memory/continual.json")
    content = read_node(file)
    measures = ("accuracy", "forgetting", "backward_transfer", "forward_transfer", "diagonal")
    lines = []
    for run in content["runs"]:
        cells = [number([seed[name] for seed in run["seeds"]], ".3f") for name in measures]
        lines.append(
            (label(run.name), *cells, number([seed["memory_bytes"] for seed in run["seeds"]], ",.0f"))
        )
    joint = [value for seed in content["joint"] for value in seed]
    lines.append((label("all maps at once"), number(joint, ".3f"), *[label("")] * 5))
    columns = (
        "run",
        "accuracy at the end",
        "forgetting",
        "backward",
        "forward",
        "each when new",
        "bytes of memory",
    )
    rows = [(run.name, [seed["accuracy"].value for seed in run["seeds"]]) for run in content["runs"]]
    chart = dot_chart(rows, x="accuracy over all maps at the end")
    return Section(
        "continual",
        CONTINUAL,
        CONTINUAL_ASKED,
        CONTINUAL_COMMAND,
        (Table("Means and deviations over seeds", columns, tuple(lines)),),
        (Figure("What is left, a mark per seed.", chart),),
        (("seeds", number(list(content["seeds"]), "d", rule="set")), *hardware([content])),
    )


def learning(folders: Sequence[Path]) -> Section:
    file = locate(folders, "mamba_hopfield/learning.json")
    if file is None:
        return absent("learning", LEARNING, LEARNING_ASKED, LEARNING_COMMAND, "mamba_hopfield/learning.json")
    content = read_node(file)
    tasks = grouped(list(content["cells"]), lambda cell: cell["task"].value)
    lines = [
        (label(f"{task}: {words}"), number([cell["result"][name] for cell in tasks[task]], spec))
        for task, measures in LEARNING_ROWS.items()
        if task in tasks
        for name, words, spec in measures
    ]
    seeds = [cell["seed"] for cell in content["cells"]]
    table = Table("Means and deviations over seeds", ("task: measure", "value"), tuple(lines))
    figures = []
    if "stability" in tasks:
        rows = [
            (words, [cell["result"][name].value for cell in tasks["stability"]])
            for name, words, _ in LEARNING_ROWS["stability"]
        ]
        chart = dot_chart(rows, x="local Lipschitz constant of the map (below one: contracting)")
        figures.append(Figure("The stability term contracts the map, a mark per seed.", chart))
    missing = tuple(f"No results of the task {task}." for task in LEARNING_ROWS if task not in tasks)
    provenance = (("seeds", number(seeds, "d", rule="set")), *hardware([content]))
    return Section(
        "learning", LEARNING, LEARNING_ASKED, LEARNING_COMMAND, (table,), tuple(figures), provenance, missing
    )
