"""Run the demo's parts in a queue that goes on where it was, and write the page."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz._checks import check
from helmholtz._files import write_atomically, write_json
from helmholtz._json import parse_json
from helmholtz.experiments.demo import language, letters, memory, selection
from helmholtz.experiments.demo.page import demo_page
from helmholtz.experiments.demo.progress import DemoProgress
from helmholtz.experiments.demo.settings import DemoSettings, Note
from helmholtz.experiments.queue import QueuedRun, run_queue, split_finished

SHARES = {"selection": 5.0, "memory": 6.0, "letters": 30.0, "language": 90.0}
"""Seconds of each part on two cores: what tells how long is left. The shortest come first."""
PARTS, RUNS, SETTINGS, PAGE = "parts", "runs", "settings.json", "index.html"
"""What the folder of a demo holds."""


def run_demo(
    settings: DemoSettings,
    folder: Path,
    console: Console,
    *,
    fresh: bool = False,
    command: language.Command = language.run_command,
) -> Path:
    """Compute what ``folder`` does not hold yet, and write the page.

    What other settings or another version of the code left there is removed; what was begun goes on.

    Args:
        fresh: begin anew in any case.
        command: runs ``helmholtz``.

    Returns: the page.
    """
    if fresh or not _is_of(folder, settings):
        for name in (PARTS, RUNS):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / SETTINGS, settings.to_dict())
    queue = [QueuedRun(name, {"seed": settings.seed}) for name in SHARES]
    _, missing = split_finished(folder / PARTS, queue)
    with DemoProgress(console, {run.name: SHARES[run.name] for run in missing}) as progress:
        run_queue(
            missing,
            lambda run: _compute(run.name, settings, progress.note(run.name), folder, command),
            folder / PARTS,
        )
    _, missing = split_finished(folder / PARTS, queue)
    check(not missing, "folder", str(folder), "one that no other process works in")
    page = folder / PAGE
    write_atomically(page, demo_page(folder / PARTS, folder / RUNS))
    return page


def _is_of(folder: Path, settings: DemoSettings) -> bool:
    try:
        return bool(parse_json((folder / SETTINGS).read_text()) == settings.to_dict())
    except (OSError, ValueError):
        return False


def _compute(
    name: str, settings: DemoSettings, note: Note, folder: Path, command: language.Command
) -> Mapping[str, Any]:
    own: dict[str, Callable[[DemoSettings, Note], Mapping[str, Any]]] = {
        "selection": selection.compute,
        "letters": letters.compute,
        "memory": memory.compute,
        "language": lambda settings, note: language.compute(settings, note, folder / RUNS, command),
    }
    found = own[name](settings, note)
    note(f"{name}: done", 1.0)
    return found
