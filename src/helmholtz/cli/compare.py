"""``helmholtz compare``."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from helmholtz.cli.arguments import make_parser, parse
from helmholtz.evals.compare import Comparison, compare, write_results
from helmholtz.evals.plots import plot_loss_curves

DESCRIPTION = "Compare finished runs at equal budgets: a table, results.json and the loss curves."


def comparison_table(comparison: Comparison) -> Table:
    title = "Comparison" if not comparison.inequalities else "Comparison at UNEQUAL budgets"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    for column in ("run", "model"):
        table.add_column(column, no_wrap=True)
    for column in (
        "\nparams",
        "validation\nbits/byte",
        "train\ntokens/s",
        "decode\ntokens/s",
        "peak\nmemory",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    best = min(row.validation_bits_per_byte for row in comparison.rows)
    for row in comparison.rows:
        table.add_row(
            row.name,
            row.model,
            f"{row.parameters:,}",
            f"{row.validation_bits_per_byte:.4f}" + (" *" if row.validation_bits_per_byte == best else "  "),
            f"{row.train_tokens_per_second:,.0f}",
            f"{row.decode_tokens_per_second:,.0f}",
            f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
        )
    return table


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("compare", DESCRIPTION)
    parser.add_argument("--runs", type=str, nargs="+", required=True, help="folders of finished runs")
    parser.add_argument("--output", type=str, default="results/comparison", help="folder of the result")
    parser.add_argument(
        "--allow_unequal", action="store_true", help="compare runs of unequal budgets, and say so"
    )
    values = parse(parser, arguments)
    output = Path(values["output"])
    comparison = compare(values["runs"], allow_unequal=values["allow_unequal"])
    write_results(comparison, values["runs"], output / "results.json")
    plot_loss_curves(values["runs"], output / "loss.png")
    console.print(comparison_table(comparison))
    for group in comparison.groups:
        if group.deviation is not None:
            console.print(
                f"{group.model}: {group.mean_bits_per_byte:.4f} ± {group.deviation:.4f} bits/byte "
                f"over seeds {', '.join(map(str, group.seeds))}"
            )
    for inequality in comparison.inequalities:
        console.print(f"unequal: {inequality}", style="bold red", markup=False)
    console.print(f"wrote {output / 'results.json'} and {output / 'loss.png'}", markup=False)
    return 0
