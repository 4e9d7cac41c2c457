"""The demo at its smallest: it ends with a page, goes on after an interruption, and forgets what is of other code."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from browser import Browser, find_chromium
from helmholtz.cli.main import main
from helmholtz.experiments.demo import language, letters, memory, run, selection
from helmholtz.experiments.demo.language import DemoError, run_command
from helmholtz.experiments.demo.progress import DemoProgress, remaining_seconds
from helmholtz.experiments.demo.run import run_demo
from helmholtz.experiments.demo.settings import DemoSettings
from helmholtz.experiments.letters.data import LetterLaw
from helmholtz.experiments.letters.run import LetterExperiment
from report_page import Cells, check_page
from tiny_runs import write_text

ROOT = Path(__file__).parents[2]
LETTERS = LetterExperiment(
    law=LetterLaw(n_characters=12, run_length=3), d_model=16, n_layers=2, n_heads=2, n_latent_bits=3, steps=3,
    batch_size=4, warmup_steps=2,
)  # fmt: skip


def in_this_process(arguments, follow):
    follow()
    assert main(list(arguments)) == 0
    follow()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = write_text(folder / "text.txt", 600)
    sizes = (
        "steps=2",
        "batch_size=2",
        "seq_len=16",
        "warmup_steps=1",
        "eval_every=1",
        "eval_tokens=64",
        "threads=1",
    )
    return folder, DemoSettings(
        models=("baseline", "fem_softmax"),
        data=(f"--data.folder={folder / 'data'}", f"--data.sources=[{text}]", "--data.tokenizer=bytes",
            "--data.vocab_size=257"),
        overrides=tuple(f"--train.{size}" for size in sizes),
        sample_tokens=4, letters=LETTERS, selection_channels=64, selection_steps=2, recall_sizes=(10,),
        recall_trials=20, resolution=11,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny):
    """Folder and page of a demo whose first call was interrupted after two parts, with what the second computed."""
    folder, settings = tiny
    computed = []

    def interrupted(arguments, follow):
        raise KeyboardInterrupt

    def counted(part):
        def compute(*arguments):
            computed.append(part.__name__.rpartition(".")[2])
            return real[part](*arguments)

        return compute

    real = {part: part.compute for part in (selection, memory, letters, language)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for part in real:
            patch.setattr(part, "compute", counted(part))
        with pytest.raises(KeyboardInterrupt):
            run_demo(settings, folder / "out", Console(quiet=True), command=interrupted)
        first, computed[:] = list(computed), []
        page = run_demo(settings, folder / "out", Console(quiet=True), command=in_this_process)
    return page, first, computed


def test_a_second_call_computes_what_the_first_did_not_end(made):
    _, first, second = made
    assert first == list(run.SHARES)
    assert second == ["language"]


def test_a_demo_of_other_settings_or_of_other_code_begins_anew(made, tiny, monkeypatch):
    folder, settings = tiny
    out = folder / "out"
    assert run._is_of(out, settings)
    assert not run._is_of(out, replace(settings, seed=1))
    monkeypatch.setattr("helmholtz.experiments.demo.settings.code_checksum", lambda: "other")
    assert not run._is_of(out, settings)


def test_every_number_in_a_table_is_that_of_its_file(made):
    page = made[0].read_text()
    assert check_page(page, ROOT) > 60


def test_every_picture_is_in_the_page_and_decodes(made):
    page = made[0].read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 10
    for drawing in drawings:
        ET.fromstring(drawing)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", page)
    assert len(pictures) >= 6
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 1


def test_the_page_has_every_part_the_samples_and_what_to_try_next(made, tiny):
    page = made[0].read_text()
    results = {
        name: json.loads((made[0].parent / run.PARTS / "results" / f"{name}.json").read_text())["result"]
        for name in run.SHARES
    }
    assert page.count("<h2>") == len(run.SHARES) + 2
    assert "<pre" in page and "make demo-full" in page
    for lines in results["letters"]["samples"].values():
        assert all(line.replace(">", "&gt;") in page for line in lines)
    losses = [row["validation_bits_per_byte"] for row in results["language"]["comparison"]["rows"]]
    cells = [text for _, _, text in Cells(page).cells]
    assert len(losses) == 2 and all(f"{loss:.3f}" in cells for loss in losses)
    assert set(results["language"]["readings"]) == {"fem_softmax"}


@pytest.mark.skipif(find_chromium() is None, reason="no chromium on the path")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_it_fits_and_asks_nobody(made, tmp_path, width, dark):
    browser = Browser(find_chromium(), tmp_path)
    try:
        browser.open(made[0], width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("data:")] == [
            made[0].absolute().as_uri()
        ]
    finally:
        browser.close()


def test_what_is_left_is_told_from_the_parts_and_the_time_so_far():
    shares = {"short": 10.0, "long": 30.0}
    assert remaining_seconds(shares, {}, 5.0) is None
    assert remaining_seconds(shares, {"short": 1.0}, 20.0) == pytest.approx(60.0)
    assert remaining_seconds(shares, {"short": 1.0, "long": 1.0}, 80.0) == 0.0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_says_what_runs(terminal):
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    with DemoProgress(console, {"short": 10.0, "long": 30.0}) as progress:
        say = progress.note("short")
        for step in range(3):
            say(f"a model: training, step {step} of 3", step / 3)
        progress.note("long")("another model", 0.5)
    text = written.getvalue()
    assert "another model" in text and "left" in text
    if not terminal:
        assert text.count("a model: training") == 1


def test_a_command_that_fails_says_what_it_wrote():
    with pytest.raises(DemoError, match="no-such-command"):
        run_command(["no-such-command"], lambda: None)
