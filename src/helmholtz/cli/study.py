"""``helmholtz study NAME run | report | list``."""

import importlib

from rich.console import Console

from helmholtz._checks import check_choice

STUDIES = {
    "letters": "what a plan holds of letters whose entropy is known: the Free Transformer's own experiment",
    "mad": "the six MAD tasks: attention, the Free Energy Mixer and its parts, Mamba, Mamba-Hopfield",
    "selection": "which token every channel can read: attention and free energy against the law",
    "language": "language models of equal parameters on two texts, and how they scale",
    "forecasting": "time series: encoders of attention and of FEM against a linear and a naive forecast",
    "vision": "a small vision transformer of attention or of FEM on digits and Fashion-MNIST",
    "recall": "what a Hopfield memory recalls of spoilt patterns, keys and pairs in a context",
    "continual": "learning one map after another with and without a memory",
}


def usage() -> str:
    lines = [f"  {name:<13}{summary}" for name, summary in STUDIES.items()]
    return "\n".join(
        [
            "usage: helmholtz study <name> <action> [options]",
            "",
            *lines,
            "",
            "helmholtz study <name> lists its actions: run computes what is missing, report makes tables and",
            "pictures of what is done, list says what is done; pilot chooses learning rates",
        ]
    )


def run(arguments: list[str], console: Console) -> int:
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        console.print(usage(), markup=False)
        return 0 if name else 2
    check_choice("study", name, STUDIES)
    module = importlib.import_module(f"helmholtz.cli.studies.{name}")
    action, *options = rest or [""]
    if action in ("", "-h", "--help"):
        lines = [f"  {name:<8}{text}" for name, text in module.ACTIONS.items()]
        console.print(
            "\n".join([f"usage: helmholtz study {name} <action> [options]", "", *lines]), markup=False
        )
        return 0 if action else 2
    check_choice("action", action, module.ACTIONS)
    module.act(action, options, console)
    return 0
