"""``helmholtz explore``."""

from pathlib import Path

from rich.console import Console

from helmholtz._checks import check, check_integer
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.explore.app import HOST, launch, require_gradio
from helmholtz.explore.runs import HOW, find_runs, offer, offer_found

DESCRIPTION = (
    "Pages in a browser, served on this machine: how a text is read, what a plan decides, where equilibria lie, and "
    "one prompt continued by every run."
)
RUNS, DEMO = Path("runs"), Path("results/demo/runs")


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("explore", DESCRIPTION)
    option = parser.add_argument
    runs = (
        "runs (their best weights) or checkpoints; default: the runs below runs/, else those of `make demo`"
    )
    option("--checkpoint", type=str, nargs="+", default=None, help=runs)
    option(
        "--port",
        type=int | None,
        default=None,
        help="port of the page; default: the first free one from 7860 on",
    )
    public = "also serve the page at a public address, through Gradio's servers"
    option("--share", action="store_true", help=public)
    values = parse(parser, arguments)
    port = values["port"]
    if port is not None:
        check_integer("port", port)
        check(port < 65536, "port", port, "below 65536")
    require_gradio()
    if values["checkpoint"] is None:
        found = offer_found(RUNS if find_runs(RUNS) else DEMO)
    else:
        found = offer(values["checkpoint"])
    if not found.runs:
        console.print(f"no run below {RUNS}/ or {DEMO}/ has weights: {HOW}")
    app = launch(found, port=port, share=values["share"])
    console.print(f"explorer of {len(found.runs)} runs: http://{HOST}:{app.server_port} (Ctrl+C ends it)")
    if app.share_url:
        console.print(f"public address: {app.share_url}")
    app.block_thread()
    return 0
