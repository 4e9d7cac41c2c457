"""Section: what only hybrids can show."""

from collections import Counter
from collections.abc import Sequence

from helmholtz.experiments.hybrids.models import TEXT_MODELS
from helmholtz.experiments.hybrids.run import hybrid_runs
from helmholtz.experiments.letters.report import kappa_label
from helmholtz.experiments.report import parts
from helmholtz.experiments.report.nodes import Node, by, grouped, ordered
from helmholtz.experiments.report.of_language import quality
from helmholtz.experiments.report.of_text import LETTER_COLUMNS

TEXT_COLUMNS = {
    "parameters": parts.column("result/parameters", ",d", only=0),
    "validation bits/byte": quality,
}
PLANNED = {
    "KL, bits per token": parts.column("result/bounds/kl_bits_per_token", ".3f"),
    "information, nats per token": parts.column("result/statistics/mutual_information", ".4f"),
    "same token under one plan": parts.column("result/sharing/one_plan/mean", ".1%"),
    "under a plan each": parts.column("result/sharing/a_plan_each/mean", ".1%"),
}
SETTLED = {
    "solver steps": parts.column("result/statistics/mean_steps", ".1f"),
    "converged": parts.column("result/statistics/converged", ".1%"),
    "relative residual": parts.column("result/statistics/residual", ".1e"),
    "contraction bound": parts.column("result/statistics/contraction_bound", ".3f"),
}


@parts.section(
    "Hybrids: a plan over FEM, an equilibrium over FEM-GLA",
    "Does a plan do more or less where all mixers are Free Energy Mixers instead of attention, and an equilibrium over "
    "FEM-GLA instead of over Mamba? At equal parameters, beside the same stacks without. With a plan the number is an "
    "upper bound.",
    "helmholtz study hybrids run --output docs/experiments/hybrids",
    "hybrids",
    find=parts.run_nodes,
)
def hybrids(nodes: Sequence[Node]) -> parts.Found:
    letters = [node for node in nodes if node.at("settings/part").value == "letters"]
    text = [node for node in nodes if node not in letters]
    models = {
        TEXT_MODELS[name].label: own
        for name, own in ordered(grouped(text, by("settings/model")), TEXT_MODELS).items()
    }
    planned = [(name, own) for name, own in models.items() if own[0].at("result/sharing").value]
    settled = [
        (name, own) for name, own in models.items() if "residual" in own[0].at("result/statistics").value
    ]
    rows = [(name, [node["result"] for node in own]) for name, own in grouped(letters, _letters_name).items()]
    tables = {
        "Letters: nats per predicted token; samples under one plan": (rows, LETTER_COLUMNS),
        "Shakespeare": (models.items(), TEXT_COLUMNS),
        "Shakespeare: what the plans hold": (planned, PLANNED),
        "Shakespeare: the equilibria of the validation text": (settled, SETTLED),
    }
    return parts.Found(
        [parts.table(caption, "model", own, columns) for caption, (own, columns) in tables.items() if own],
        [
            parts.dots(
                "A mark per seed.", models.items(), "result/bits_per_byte", x="validation bits per byte"
            )
        ],
        parts.queue_provenance(nodes),
        parts.incomplete(
            (node.at("settings/part").value for node in nodes),
            Counter(run.settings["part"] for run in hybrid_runs()),
        ),
    )


def _letters_name(node: Node) -> str:
    settings = node["settings"].value
    kappa = kappa_label(settings["kappa_bits"])
    return f"{settings['model']}, {kappa}{'' if settings['kappa_bits'] is None else ' free bits'}"
