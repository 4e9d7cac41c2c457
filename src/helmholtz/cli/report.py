"""``helmholtz report``."""

from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz._files import write_atomically
from helmholtz.cli.arguments import make_parser, output_file, parse
from helmholtz.experiments.report.page import build_sections, render

DESCRIPTION = (
    "One HTML page of all results in some folders: tables, figures, hardware, seeds, commits and commands. It loads "
    "nothing, and every number says from which JSON file it is."
)


def options(arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser("report", DESCRIPTION)
    parser.add_argument("folders", type=str, nargs="+", help="folders of results, such as docs/experiments")
    parser.add_argument("--output", type=str, default="results/report.html", help="file of the page")
    return parse(parser, arguments)


def run(arguments: list[str], console: Console) -> int:
    values = options(arguments)
    folders, file = [Path(folder) for folder in values["folders"]], output_file("output", values["output"])
    sections = build_sections(folders)
    write_atomically(file, render(sections, folders))
    for section in sections:
        console.print(f"{section.title}: {'no results' if section.empty else 'done'}")
    console.print(f"wrote {file}")
    return 0
