"""What the page says of each part's results."""

from collections.abc import Mapping

from helmholtz.experiments.demo.figures import landscape_chart, picture_chart, weight_chart
from helmholtz.experiments.report.charts import Curve, heat_charts, line_chart
from helmholtz.experiments.report.nodes import Cell, Node, by, grouped, label, number
from helmholtz.experiments.report.of_selection import SHOWN
from helmholtz.experiments.report.of_text import comparison
from helmholtz.experiments.report.parts import Figure, Listing, Section, Table
from helmholtz.experiments.selection.data import expected_gap

READING = {
    "tokens that the prior reads": ("num_tokens_prior", ".2f"),
    "that the channels read": ("num_tokens_posterior", ".2f"),
    "KL gap, nats": ("kl", ".3f"),
    "beta": ("beta_max", ".2f"),
    "inner gate": ("inner_gate", ".2f"),
}
KINDS = {
    "noise": "noise of {:g} times the norm of the digit",
    "mask": "{:.0%} of the pixels erased",
    "flip": "{:.0%} of the pixels inverted",
}


def _cells(row: Node, columns: Mapping[str, tuple[str, str]]) -> tuple[Cell, ...]:
    return tuple(number(row[name], spec) for name, spec in columns.values())


def language(result: Node) -> Section:
    """Models of one size: losses, speeds, samples, and how FEM reads."""
    curves = [
        Curve(node.name.replace("_", " "), node["tokens"].value, node["bits_per_byte"].value)
        for node in result["curves"]
    ]
    chart = line_chart(curves, x="training tokens", y="validation bits per byte")
    figures = [Figure("Validation loss as training goes on: lower is better.", chart)]
    tables = [comparison(result["comparison"], ()).tables[0]]
    for reading in result["readings"]:
        tables.append(_reading_table(reading))
        figures.append(_reading_figure(reading))
    return Section(
        "language",
        "Language models of one size on Shakespeare",
        "Equal parameters, equal text, equal schedule: what does each predict, how fast is it, and what do the "
        "channels of the Free Energy Mixer read?",
        "make demo-full\nhelmholtz study language run --help",
        tables=tables,
        figures=figures,
        listings=[
            Listing(f"A sample of {node.name.replace('_', ' ')}", node.value) for node in result["samples"]
        ],
    )


def _reading_table(reading: Node) -> Table:
    rows = tuple((label(row["layer"].value), *_cells(row, READING)) for row in reading["summary"])
    name = reading.name.replace("_", " ")
    return Table(f"How the layers of {name} read one line, on average", ("layer", *READING), rows)


def _reading_figure(reading: Node) -> Figure:
    rows = {name.partition(":")[0]: weights for name, weights in reading["rows"].value.items()}
    where = f"{reading['layer'].value}, head {reading['head'].value}"
    caption = (
        f"Which tokens the last one reads in {where}: all channels of a head share the prior (top), and each tilts it "
        "by its own values."
    )
    return Figure(caption, weight_chart(rows, reading["words"].value, unit="weight"))


def selection(result: Node) -> Section:
    """Gaps beside their closed form, and trained layers."""
    layers = {(row["read"].value, row["beta"].value): row for row in result["layers"]}
    measured = {row["beta"].value: row for row in result["gaps"] if row["read"].value in ("mean", "op")}
    lines = []
    for beta, row in measured.items():
        layer = layers[("free_energy", beta) if beta else ("mean", 1.0)]
        name = f"free energy, beta {beta:g}" if beta else "attention: the mean"
        numbers = (
            number(row["law"], ".3f"), number(row["gap"], ".3f"), number(row["bound"], ".3f"),
            number(layer["rms_error"], ".3f"), number(layer["selected"], ".0%"),
        )  # fmt: skip
        lines.append((label(name), *numbers))
    columns = (
        "read",
        "gap, closed form",
        "gap, measured",
        "bound ln n / beta",
        "error of a trained layer",
        "on their token",
    )
    n_tokens = result["n_tokens"].value
    caption = f"Every channel wants the largest of {n_tokens} values; gaps in their standard deviations"
    return Section(
        "selection",
        "Why free energy selects",
        "Attention averages: all channels of a head read the same mixture. A free energy reads at least the average "
        "and at most the largest value, in every channel by itself; how close it comes to the largest is known in "
        "closed form.",
        "helmholtz study selection run",
        tables=(Table(caption, columns, tuple(lines)),),
        figures=(_gap_figure(measured, n_tokens), _read_figure(result["layers"])),
    )


def _gap_figure(measured: Mapping[float, Node], n_tokens: int) -> Figure:
    betas = sorted(beta for beta in measured if beta)
    fine = [betas[0] * (betas[-1] / betas[0]) ** (step / 40) for step in range(41)]
    mean = measured[0.0]["gap"].value
    curves = [
        Curve("free energy, closed form", fine, [expected_gap(n_tokens, beta) for beta in fine], "-", 0),
        Curve("free energy, measured", betas, [measured[beta]["gap"].value for beta in betas], "o", 0),
        Curve("attention, measured", [betas[0], betas[-1]], [mean, mean], "--", 1),
    ]
    chart = line_chart(curves, x="beta", y="gap to the largest value", log_x=True, log_y=True)
    return Figure("How far a read stays below the largest value of its channel.", chart)


def _read_figure(layers: Node) -> Figure:
    shown = [row for row in layers if row["label"].value in SHOWN]
    panels = [(row["label"].value.replace(", ", ",\n"), row["example"]["influence"].value) for row in shown]
    marks = [row["example"]["token"].value for row in shown]
    caption = (
        "Which token moves each channel of a trained layer; circles: the token that holds its largest value."
    )
    return Figure(caption, heat_charts(panels, x="token", y="channel", marks=marks))


def letters(result: Node) -> Section:
    """Samples under one plan and several, what they share, and the bits that say the place."""
    law = result["law"].value
    heat = result["information"].value
    rows = {f"bit {place}": row for place, row in enumerate(heat)}
    chart = weight_chart(
        rows, [str(place) for place in range(len(heat[0]))], x="token", unit="bits on the place"
    )
    caption = (
        "What each bit of a plan says, by itself, on where the run starts (the encoder's plans of sequences)."
    )
    names = {
        "a plan each": "A plan for each sample",
        "one plan": "One plan for all",
        "another plan": "Another plan for all",
    }
    return Section(
        "letters",
        "A decoder that plans",
        f"Sequences of one letter: a run of {law['run_length']} in a line of {law['n_characters']}, its start drawn "
        f"from {law['n_starts']} places, and noise (!). The Free Transformer may hold a few free bits of each in a "
        "latent plan, before the first character is written. Does the plan hold the place?",
        "helmholtz study letters run --kappas 0.015625 0.25 0.5 1 --profile ci",
        tables=(_shared_table(result), _held_table(result), _bound_table(result)),
        figures=(Figure(caption, chart),),
        listings=[Listing(names[node.name], "\n".join(node.value)) for node in result["samples"]],
    )


def _shared_table(result: Node) -> Table:
    rows = {
        "samples under one plan": result["measured"]["shared"],
        "samples under a plan each": result["measured"]["independent"],
        "the data distribution": result["distribution"],
    }
    specs = {
        "spread of the start": ("spread", ".1f"),
        "noise repeated": ("noise_repetition", "z.2f"),
        "valid": ("valid", ".0%"),
    }
    lines = tuple((label(name), *_cells(row, specs)) for name, row in rows.items())
    return Table(
        "What samples share: spread is the median distance of a start from the median", ("", *specs), lines
    )


def _held_table(result: Node) -> Table:
    lines = []
    for place, (told, row) in enumerate(zip(result["mean_information"], result["held"], strict=True)):
        cells = (number(told, "z.2f"), number(row["this_shared"], ".1f"), number(row["others_shared"], ".1f"))
        lines.append((label(f"bit {place} of every token"), *cells))
    columns = ("of a plan", "bits on the place, mean", "spread if it is shared", "spread if all others are")
    return Table(
        "Which bits decide the place: samples share a part of a plan and draw the rest", columns, tuple(lines)
    )


def _bound_table(result: Node) -> Table:
    bounds = result["measured"]["bounds"]
    cells = {
        "under the plan read from it": number(bounds["posterior_cross_entropy"], ".3f"),
        "under a plan drawn": number(bounds["prior_cross_entropy"], ".3f"),
        "entropy of the data": number(bounds["law"], ".3f"),
        "bits in a plan (KL)": number(result["plan_bits"], ".1f"),
        "bits of the place": number(result["place_bits"], ".1f"),
    }
    caption = "What a sequence costs, in nats per token, and what its plan holds, in bits per sequence"
    return Table(caption, ("", *cells), ((label("Free Transformer"), *cells.values()),))


def memory(result: Node) -> Section:
    """Digits recalled, how many, and the energy that does it."""
    found = result["landscape"].value
    caption = (
        "The energy of the memory of ten digits in the plane of three of them: level lines, the basin of each minimum "
        "(colours), saddles between them, and the path of plain steps from some starts. Every step goes down."
    )
    return Section(
        "memory",
        "A memory that is an energy",
        "Patterns are written once, without training; to recall is to descend an energy from a corrupted one. The "
        f"margin says beforehand which patterns are safe: by how many nats one outweighs all others together at its "
        f"own place, which should be {result['safe_margin'].value:g} or more.",
        "helmholtz study recall run --profile capacity\nhelmholtz landscape --help",
        tables=(_recall_table(result["recalled"]),),
        figures=(
            *map(_digit_figure, result["examples"]),
            Figure(caption, landscape_chart(found)),
            *_recall_figures(result),
        ),
    )


def _digit_figure(example: Node) -> Figure:
    rows = {name: example[name].value for name in ("stored", "corrupted", "recalled")}
    kind = KINDS[example["kind"].value].format(example["level"].value)
    count = len(rows["stored"])
    caption = f"{kind[0].upper()}{kind[1:]}: {example['right'].value} of {count} recalled."
    return Figure(caption, picture_chart(rows))


def _by_memory(recalled: Node) -> dict[tuple[float, int], list[Node]]:
    return grouped(recalled, lambda row: (row["beta"].value, row["n_patterns"].value))


def _recall_table(recalled: Node) -> Table:
    groups = _by_memory(recalled)
    levels = list(grouped(recalled, by("level")))
    lines = []
    for (beta, count), rows in groups.items():
        cells = (number(rows[0]["margin"], ".1f"), number(rows[0]["safe"], ".0%"))
        lines.append(
            (
                label(f"{count:,} digits, beta {beta:g}"),
                *cells,
                *(number(row["exact"], ".0%") for row in rows),
            )
        )
    columns = (
        "memory",
        "smallest margin, nats",
        "digits above 3 nats",
        *(f"recalled at noise {level:g}" for level in levels),
    )
    return Table(
        "What the margin says beforehand, and what is recalled exactly (noise in norms of a digit)",
        columns,
        tuple(lines),
    )


def _recall_figures(result: Node) -> tuple[Figure, Figure]:
    groups = _by_memory(result["recalled"]).items()

    def chart(what: str, y: str) -> str:
        curves = []
        for (beta, count), rows in groups:
            levels, heights = ([row[name].value for row in rows] for name in ("level", what))
            curves.append(Curve(f"{count:,} digits, beta {beta:g}", levels, heights))
        return line_chart(curves, x="noise, in norms of a digit", y=y)

    return (
        Figure("Digits recalled exactly as noise grows.", chart("exact", "fraction recalled")),
        Figure(
            "By how many nats the right digit outweighs all others at the corrupted query (median): below 0 the "
            "descent begins towards another.",
            chart("margin_at_query", "nats"),
        ),
    )
