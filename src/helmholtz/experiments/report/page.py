"""All sections as one HTML page that needs nothing but itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

from helmholtz._checks import check
from helmholtz.experiments.report.of_engineering import faults, speed
from helmholtz.experiments.report.of_hybrids import hybrids
from helmholtz.experiments.report.of_language import language, scaling
from helmholtz.experiments.report.of_memory import continual, learning, recall
from helmholtz.experiments.report.of_selection import selection
from helmholtz.experiments.report.of_tasks import forecasting, mad, vision
from helmholtz.experiments.report.of_text import demo, letters, llama, plans
from helmholtz.experiments.report.parts import Section

TITLE = "What free-energy networks do, measured"
LEAD = (
    "Every number in a table was read from a JSON file of a committed command: touch it to see which file and where in "
    "it. Means are over seeds, ± is the sample deviation. Nothing on this page comes from elsewhere."
)
SECTIONS: tuple[Callable[[Sequence[Path]], Section], ...] = (
    selection,
    mad,
    language,
    scaling,
    hybrids,
    demo,
    plans,
    letters,
    llama,
    recall,
    continual,
    learning,
    forecasting,
    vision,
    faults,
    speed,
)


def build_sections(folders: Sequence[Path]) -> list[Section]:
    """Every section, from the first folder that has its files; those without say so.

    Raises: ValueError for a folder that is not there, or a file that is not what its section reads.
    """
    check(bool(folders), "folders", list(folders), "at least one folder of results")
    for folder in folders:
        check(folder.is_dir(), "folders", str(folder), "folders of results")
    return [build(folders) for build in SECTIONS]


def render(sections: Sequence[Section], folders: Sequence[Path]) -> str:
    """The page of all results. Raises: as ``render_page``."""
    names = ", ".join(folder.as_posix() for folder in folders)
    foot = f"Written by helmholtz report from {names}."
    return render_page(sections, title=TITLE, lead=LEAD, again="How to have it again", foot=foot)


def render_page(sections: Sequence[Section], *, title: str, lead: str, again: str, foot: str) -> str:
    """A page of sections.

    Args:
        again: what opens a section's command and provenance.

    Raises: ImportError naming the extra if Jinja is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs Jinja: install helmholtz-nn[plot]") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, lead=lead, sections=sections, again=again, foot=foot) + "\n"
