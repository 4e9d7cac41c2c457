"""Sections: language models on text, plans, and free energy in a foreign model."""

from collections.abc import Sequence
from pathlib import Path

from helmholtz.experiments.report.charts import Curve, dot_chart, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, grouped, label, number, read_node
from helmholtz.experiments.report.section import Figure, Section, Table, absent, hardware, locate

DEMO = "The demo: models of one size on Shakespeare"
DEMO_ASKED = "What do the three systems reach beside a baseline of equal parameters, tokens and schedule?"
PLANS = "Does a plan help on Shakespeare?"
PLANS_ASKED = (
    "The Free Transformer beside its baseline and a control with one more block. What has a plan is an upper bound "
    "(the mixture bound), above which nothing is decided."
)
LETTERS = "What a plan holds, on a law whose entropy is known"
LETTERS_ASKED = (
    "As the free bits per token grow: does the plan hold nothing, the place of the run, the "
    "noise, or a copy of the text?"
)
LLAMA = "Free energy in a trained Llama"
LLAMA_ASKED = (
    "Is a trained Llama better after a fine-tune of its new free-energy parameters than as it "
    "was, and is it they?"
)


def demo(folders: Sequence[Path]) -> Section:
    file = locate(folders, "shakespeare/seven_models.json", "comparison/results.json")
    if file is None:
        return absent("demo", DEMO, DEMO_ASKED, "make demo", "shakespeare/seven_models.json")
    content = read_node(file)
    missing = ("One seed.",) if len({row["seed"].value for row in content["rows"]}) == 1 else ()
    return _comparison(content, "demo", DEMO, DEMO_ASKED, "make demo", missing)


def plans(folders: Sequence[Path]) -> Section:
    command = "python examples/shakespeare_plans.py --output docs/experiments/shakespeare_plans"
    file = locate(folders, "shakespeare_plans/results.json")
    if file is None:
        return absent("plans", PLANS, PLANS_ASKED, command, "shakespeare_plans/results.json")
    return _comparison(read_node(file), "plans", PLANS, PLANS_ASKED, command, ())


def _comparison(
    content: Node, anchor: str, title: str, asked: str, command: str, missing: tuple[str, ...]
) -> Section:
    """Of a file of ``helmholtz compare``: a line per model, means over seeds."""
    models = grouped(
        list(content["rows"]), lambda row: row["name"].value.rpartition("-")[0] or row["name"].value
    )
    lines, dots = [], []
    for name, rows in models.items():
        bound = rows[0]["kind"].value == "bound"
        quality = [row["validation_bits_per_byte"] for row in rows]
        text = name.replace("_", " ")
        lines.append(
            (
                label(text),
                number(rows[0]["parameters"], ",d"),
                number(quality, ".3f", prefix="≤ " if bound else ""),
                number([row["train_tokens_per_second"] for row in rows], ",.0f"),
                number([row["decode_tokens_per_second"] for row in rows], ",.0f"),
            )
        )
        dots.append((f"{text} (bound)" if bound else text, [node.value for node in quality]))
    columns = ("model", "parameters", "validation bits/byte", "train tokens/s", "decode tokens/s")
    tokens = number([row["tokens"] for row in content["rows"]], ",d", rule="set")
    seeds = number([row["seed"] for row in content["rows"]], "d", rule="set")
    return Section(
        anchor,
        title,
        asked,
        command,
        (Table("Whole validation split, weights of lowest validation loss", columns, tuple(lines)),),
        (Figure("Lower is better; a mark per seed.", dot_chart(dots, x="validation bits per byte")),),
        (("training tokens", tokens), ("seeds", seeds), *hardware([content])),
        missing,
    )


def letters(folders: Sequence[Path]) -> Section:
    command = (
        "helmholtz study letters run --kappas 0.015625 0.125 1 8 --profile paper --output results/synthetic"
    )
    file = locate(folders, "plan_letters/paper.json", "synthetic/results.json")
    if file is None:
        return absent("letters", LETTERS, LETTERS_ASKED, command, "plan_letters/paper.json")
    content = read_node(file)
    kappas = grouped(list(content["cells"]), lambda cell: cell["kappa_bits"].value)
    lines = [
        (_kappa(kappa), *_letter_cells([cell["result"] for cell in cells])) for kappa, cells in kappas.items()
    ]
    law = content["law"]
    lines.append(
        (label("the law itself"), *[number(content["vanilla_floor"], ".4f")] * 2, label(""),
         number(law["spread"], ".1f"), number(law["noise_repetition"], ".2f"))
    )  # fmt: skip
    columns = (
        "free bits per token",
        "posterior CE",
        "prior CE",
        "KL, nats",
        "spread of the start",
        "noise repeated",
    )
    planned = sorted(kappa for kappa in kappas if kappa is not None)
    curves = [
        Curve(name, planned, [_mean(kappas[kappa], measure) for kappa in planned])
        for name, measure in (
            ("posterior (sees the text)", "posterior_cross_entropy"),
            ("prior", "prior_cross_entropy"),
        )
    ]
    curves.append(
        Curve("entropy of the law", [planned[0], planned[-1]], [content["vanilla_floor"].value] * 2, "--", 8)
    )
    chart = line_chart(curves, x="free bits per token", y="nats per token", log_x=True, log_y=True)
    return Section(
        "letters",
        LETTERS,
        LETTERS_ASKED,
        command,
        (Table("Nats per predicted token; samples under one plan", columns, tuple(lines)),),
        (Figure("The more a plan may hold, the further prior and posterior part.", chart),),
        (("seeds", number([cell["seed"] for cell in content["cells"]], "d", rule="set")),
         *hardware(list(content["cells"]))),
    )  # fmt: skip


def _kappa(kappa: float | None) -> Cell:
    if kappa is None:
        return label("no plan")
    return label(f"{kappa:g}" if kappa >= 1 else f"1/{round(1 / kappa)}")


def _letter_cells(results: Sequence[Node]) -> tuple[Cell, ...]:
    return (
        number([result["bounds"]["posterior_cross_entropy"] for result in results], ".4f"),
        number([result["bounds"]["prior_cross_entropy"] for result in results], ".4f"),
        number([result["bounds"]["kl"] for result in results], ".3f"),
        number([result["shared"]["spread"] for result in results], ".1f"),
        number([result["shared"]["noise_repetition"] for result in results], ".2f"),
    )


def _mean(cells: Sequence[Node], measure: str) -> float:
    return sum(cell["result"]["bounds"][measure].value for cell in cells) / len(cells)


def llama(folders: Sequence[Path]) -> Section:
    command = "python examples/llama_free_energy.py"
    file = locate(folders, "free_energy_llama/results.json")
    if file is None:
        return absent("llama", LLAMA, LLAMA_ASKED, command, "free_energy_llama/results.json")
    content = read_node(file)
    names = {
        "unchanged": "nothing trained",
        "new_alone": "the new parameters",
        "outer_gate_alone": "of these the outer gate (control)",
        "all_without": "everything, without free energy",
        "all_with": "everything, with it",
    }
    cells = list(content["cells"])
    seeds = [f"seed {cell['seed'].value}" for cell in cells]
    lines, dots = [], []
    for name, text in names.items():
        results = [cell["result"][name] for cell in cells]
        losses = [result["validation"] for result in results]
        lines.append(
            (label(text), number(results[0]["trained_parameters"], ",d"), *(number(loss, ".4f") for loss in losses),
             number(losses, ".4f"))
        )  # fmt: skip
        differences = [
            loss.value - cell["result"]["unchanged"]["validation"].value
            for loss, cell in zip(losses, cells, strict=True)
        ]
        dots.append((text, differences))
    columns = ("trained", "parameters trained", *seeds, "mean and deviation")
    return Section(
        "llama",
        LLAMA,
        LLAMA_ASKED,
        command,
        (Table("Validation loss, nats per token", columns, tuple(lines)),),
        (Figure("Change of the loss against the unchanged model.", dot_chart(dots, x="nats per token")),),
        (("seeds", number([cell["seed"] for cell in cells], "d", rule="set")), *hardware([content])),
    )
