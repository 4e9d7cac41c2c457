"""``helmholtz compare``."""

from rich.console import Console
from rich.table import Table

from helmholtz.cli.arguments import make_parser, output_folder, parse
from helmholtz.evals.compare import POSTERIOR_SAMPLES, Comparison, Group, Row, compare, leaders, write_results
from helmholtz.evals.latent import PRIOR_DRAWS
from helmholtz.evals.plots import plot_loss_curves
from helmholtz.experiments.base import make_table

DESCRIPTION = "Compare finished runs at equal budgets: a table, results.json and the loss curves."

WIDTH = 120
"""Columns that the table may take where the terminal has fewer: a wrapped line is better than a cut number."""


def comparison_table(comparison: Comparison) -> Table:
    title = "Comparison" if not comparison.inequalities else "Comparison at UNEQUAL budgets"
    best = leaders(comparison.rows)
    return make_table(title, [_cells(row, row.name in best) for row in comparison.rows], left=2)


def _cells(row: Row, is_best: bool) -> dict[str, str]:
    return {
        "run": row.name,
        "model": row.model,
        "\nparams": f"{row.parameters:,}",
        "validation\nbits/byte": _number(row, row.validation_bits_per_byte) + (" *" if is_best else "  "),
        "train\ntokens/s": f"{row.train_tokens_per_second:,.0f}",
        "decode\ntokens/s": f"{row.decode_tokens_per_second:,.0f}",
        "peak\nmemory": _mebibytes(row.peak_memory_bytes),
    }


def _mebibytes(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:,.0f} MiB"


def _number(of: Row | Group, value: float) -> str:
    return ("<= " if of.kind == "bound" else "") + f"{value:.4f}"


def footnotes(comparison: Comparison) -> list[str]:
    """What the numbers are, and where the parameters of models with a plan are."""
    lines = [f"bits/byte: whole validation split, windows of {comparison.window} tokens without overlap"]
    if not any(row.kind == "bound" for row in comparison.rows):
        return lines
    lines.append(
        f"<=: upper bound (mixture-weighted) from {POSTERIOR_SAMPLES} plans of the posterior and {PRIOR_DRAWS} of the "
        "prior per window. Below every exact number it is a win (*); above one it is inconclusive"
    )
    for row in comparison.rows:
        parts = ", ".join(f"{name} {size:,}" for name, size in row.parts.items() if size)
        lines.append(f"parameters of {row.name}: {parts}")
    return lines


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("compare", DESCRIPTION)
    option = parser.add_argument
    option("--runs", type=str, nargs="+", required=True, help="folders of finished runs")
    option("--output", type=str, default="results/comparison", help="folder for the results")
    option(
        "--allow_unequal", action="store_true", help="compare runs of unequal budgets too; the table says so"
    )
    option("--data", type=str, help="folder of the prepared text, if it was moved since training")
    option("--batch_size", type=int, help="windows per forward pass (default: as in training)")
    values = parse(parser, arguments)
    output = output_folder("output", values["output"], figures=True)
    comparison = compare(
        values["runs"],
        allow_unequal=values["allow_unequal"],
        data_folder=values["data"],
        batch_size=values["batch_size"],
    )
    write_results(comparison, values["runs"], output / "results.json")
    plot_loss_curves(values["runs"], output / "loss.png")
    console.width = max(console.width, WIDTH)
    console.print(comparison_table(comparison))
    for line in footnotes(comparison):
        console.print(line)
    for group in comparison.groups:
        if group.deviation is not None:
            console.print(
                f"{group.model}: {_number(group, group.mean_bits_per_byte)} ± {group.deviation:.4f} bits/byte "
                f"over seeds {', '.join(map(str, group.seeds))}"
            )
    for inequality in comparison.inequalities:
        console.print(f"unequal: {inequality}", style="bold red")
    console.print(f"wrote {output / 'results.json'} and {output / 'loss.png'}")
    return 0
