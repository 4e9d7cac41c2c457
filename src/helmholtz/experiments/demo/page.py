"""The demo's page: the sections of its parts, how long each took and what to try next."""

from pathlib import Path

from helmholtz.experiments.demo import sections
from helmholtz.experiments.records import RESULTS
from helmholtz.experiments.report import parts
from helmholtz.experiments.report.nodes import Node, label, number, read_node
from helmholtz.experiments.report.page import render_page
from helmholtz.experiments.report.parts import Listing, Section, Table

TITLE = "What helmholtz does, computed on this machine"
LEAD = (
    "Free energy as the mixer of a language model, why it selects, a decoder that plans, and a memory that is an "
    "energy. All of it was trained and measured by the run that wrote this page, with one seed. Models this small, "
    "trained this shortly, show how things work and not which is best: the guides have longer runs. Touch a number in "
    "a table to see the file that it is from."
)
SECTIONS = {
    "language": sections.language,
    "selection": sections.selection,
    "letters": sections.letters,
    "memory": sections.memory,
}
NEXT = """\
# seven models of all three systems, some minutes longer
make demo-full
# write on
helmholtz generate --checkpoint {runs}/fem_softmax \\
  --prompt "ROMEO."
# what each channel reads in your own line
helmholtz inspect --checkpoint {runs}/fem_softmax \\
  --text "To be, or not to be" --picture reading.png
# another prior
helmholtz train --config configs/demo.yaml \\
  --config configs/demo/fem_gla.yaml
# your own text
helmholtz data --help
# the experiments behind the guides
helmholtz study --help
"""


def demo_page(folder: Path, runs: Path) -> str:
    """The page of the finished parts in ``folder``.

    Args:
        runs: where the language models are, for the commands to try next.
    """
    found = {name: read_node(folder / RESULTS / f"{name}.json") for name in SECTIONS}
    shown = [build(found[name]["result"]) for name, build in SECTIONS.items()]
    shown.append(_times(found, {section.anchor: section.title for section in shown}))
    listing = Listing("In the folder of the repository", NEXT.format(runs=runs.as_posix()))
    words = "Commands for the shell, with .venv activated."
    shown.append(Section("next", "What to try next", words, "", listings=(listing,)))
    return render_page(
        shown, title=TITLE, lead=LEAD, again="How to have it longer, or again", foot="Written by make demo."
    )


def _times(found: dict[str, Node], titles: dict[str, str]) -> Section:
    """How long each part took, and on what."""
    timings = {name: times for name, node in found.items() if (times := parts.timing(node)) is not None}
    rows = [(label(titles[name]), number(times["seconds"], ",.0f")) for name, times in timings.items()]
    total = number([times["seconds"] for times in timings.values()], ",.0f", rule="sum")
    provenance = parts.hardware(list(timings.values()))
    cells = tuple((label(name), cell) for name, cell in provenance)
    return Section(
        "times",
        "This run",
        "How long each part took in its last call, and what it ran on.",
        "",
        tables=(
            Table("Seconds, with the clock on the wall", ("part", "seconds"), (*rows, (label("all"), total))),
            Table("Processor, versions, commit", ("what", "found"), cells),
        ),
    )
