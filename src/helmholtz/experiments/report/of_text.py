"""Sections: language models on text, plans, and free energy in a foreign model."""

from collections.abc import Sequence

from helmholtz.experiments.report import parts
from helmholtz.experiments.report.charts import Curve, dot_chart, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, by, grouped, label, mean, number

LETTER_COLUMNS = {
    "posterior CE": parts.column("bounds/posterior_cross_entropy", ".4f"),
    "prior CE": parts.column("bounds/prior_cross_entropy", ".4f"),
    "KL, nats": parts.column("bounds/kl", ".3f"),
    "spread of the start": parts.column("shared/spread", ".1f"),
    "noise repeated": parts.column("shared/noise_repetition", ".2f"),
}
TRAINED = {
    "unchanged": "nothing trained",
    "new_alone": "the new parameters",
    "outer_gate_alone": "of these the outer gate (control)",
    "all_without": "everything, without free energy",
    "all_with": "everything, with it",
}


@parts.section(
    "The demo: models of one size on Shakespeare",
    "What do the three systems reach beside a baseline of equal parameters, tokens and schedule?",
    "make demo-full",
    *("shakespeare/seven_models.json", "comparison/results.json"),
    find=parts.file_node,
)
def demo(content: Node) -> parts.Found:
    is_single = len(grouped(content["rows"], by("seed"))) == 1
    return comparison(content, ("One seed.",) if is_single else ())


@parts.section(
    "Does a plan help on Shakespeare?",
    "The Free Transformer beside its baseline and a control with one more block. What has a plan is an upper bound "
    "(the mixture bound); a bound above the baseline's exact loss is inconclusive.",
    "python examples/shakespeare_plans.py --output docs/experiments/shakespeare_plans",
    "shakespeare_plans/results.json",
    find=parts.file_node,
)
def plans(content: Node) -> parts.Found:
    return comparison(content, ())


def comparison(content: Node, missing: Sequence[str]) -> parts.Found:
    """Of a file of ``helmholtz compare``: a line per model, means over seeds."""
    models = grouped(content["rows"], _model_name)
    columns: dict[str, parts.Column] = {
        "parameters": parts.column("parameters", ",d", only=0),
        "validation bits/byte": lambda rows: number(
            [row["validation_bits_per_byte"] for row in rows], ".3f", prefix="≤ " if _is_bound(rows) else ""
        ),
        "train tokens/s": parts.column("train_tokens_per_second", ",.0f"),
        "decode tokens/s": parts.column("decode_tokens_per_second", ",.0f"),
    }
    dots = [
        (
            f"{name} (bound)" if _is_bound(rows) else name,
            [row["validation_bits_per_byte"].value for row in rows],
        )
        for name, rows in models.items()
    ]
    caption = "Whole validation split, weights of lowest validation loss"
    return parts.Found(
        [parts.table(caption, "model", models.items(), columns)],
        [parts.Figure("Lower is better; a mark per seed.", dot_chart(dots, x="validation bits per byte"))],
        (
            ("training tokens", parts.different(content["rows"], "tokens", ",d")),
            parts.seeds(content["rows"]),
            *parts.hardware([content]),
        ),
        missing,
    )


def _model_name(row: Node) -> str:
    name = row["name"].value
    return (name.rpartition("-")[0] or name).replace("_", " ")


def _is_bound(rows: Sequence[Node]) -> bool:
    return bool(rows[0]["kind"].value == "bound")


@parts.section(
    "What a plan holds, on a data distribution whose entropy is known",
    "As the free bits per token grow: does the plan hold nothing, the place of the run, the noise, or a copy of the "
    "text?",
    "helmholtz study letters run --kappas 0.015625 0.125 1 8 --profile paper --output results/synthetic",
    *("plan_letters/paper", "synthetic"),
    find=parts.run_nodes,
)
def letters(nodes: Sequence[Node]) -> parts.Found:
    models = [node for node in nodes if "kappa_bits" in node["settings"].value]
    by_kappa = grouped(models, by("settings/kappa_bits"))
    planned = sorted(kappa for kappa in by_kappa if kappa is not None)
    kappas = {
        kappa: [node.at("result/result") for node in by_kappa[kappa]]
        for kappa in (None, *planned)
        if kappa in by_kappa
    }
    rows = [(_spoken(kappa), results) for kappa, results in kappas.items()]
    found = parts.table(
        "Nats per predicted token; samples under one plan", "free bits per token", rows, LETTER_COLUMNS
    )
    curves, last = [], list[tuple[Cell, ...]]()
    for name, measure in (("posterior (sees the text)", "posterior"), ("prior", "prior")):
        heights = [mean(kappas[kappa], f"bounds/{measure}_cross_entropy") for kappa in planned]
        curves.append(Curve(name, planned, heights))
    for own in (node["result"] for node in nodes if node not in models):
        floor, law = own["vanilla_floor"], own["law"]
        curves.append(Curve("entropy of the data", planned[:1] + planned[-1:], [floor.value] * 2, "--", 8))
        shared = (number(law["spread"], ".1f"), number(law["noise_repetition"], ".2f"))
        last.append((label("the data distribution itself"), *[number(floor, ".4f")] * 2, label(""), *shared))
    chart = line_chart(curves, x="free bits per token", y="nats per token", log_x=True, log_y=True)
    return parts.Found(
        [parts.Table(found.caption, found.columns, (*found.rows, *last))],
        [parts.Figure("The more a plan may hold, the further prior and posterior part.", chart)],
        parts.queue_provenance(nodes),
    )


def _spoken(kappa: float | None) -> str:
    if kappa is None:
        return "no plan"
    return f"{kappa:g}" if kappa >= 1 else f"1/{round(1 / kappa)}"


@parts.section(
    "Free energy in a trained Llama",
    "Is a trained Llama better after a fine-tune of its new free-energy parameters than as it was, and is it they?",
    "python examples/llama_free_energy.py",
    "free_energy_llama/results.json",
    find=parts.file_node,
)
def llama(content: Node) -> parts.Found:
    cells = list(content["cells"])
    rows = [(text, [cell["result"][name] for cell in cells]) for name, text in TRAINED.items()]
    columns = {"parameters trained": parts.column("trained_parameters", ",d", only=0)}
    for place, cell in enumerate(cells):
        columns[f"seed {cell['seed'].value}"] = parts.column("validation", ".4f", only=place)
    columns["mean and deviation"] = parts.column("validation", ".4f")
    losses = [(text, [result["validation"].value for result in results]) for text, results in rows]
    unchanged = losses[0][1]
    changes = [(text, [a - b for a, b in zip(own, unchanged, strict=True)]) for text, own in losses]
    return parts.Found(
        [parts.table("Validation loss, nats per token", "trained", rows, columns)],
        [
            parts.Figure(
                "Change of the loss against the unchanged model.", dot_chart(changes, x="nats per token")
            )
        ],
        (parts.seeds(cells), *parts.hardware([content])),
    )
