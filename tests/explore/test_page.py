"""The explorer as a program: its answers through Gradio's client, and its page in a browser.

One server of tiny random models for all of it; skipped where Gradio, Playwright or Chromium is missing.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from browser import find_chromium
from equilibrium_cases import make_model
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig

pytest.importorskip("gradio", reason="no gradio: pip install 'helmholtz-nn[explore]'")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 192}
BITS = "#plan-bits input[type=checkbox]"
TABS = ("Read", "Plan", "Equilibrium", "Compare")
SECONDS = 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def save_models(folder):
    """A model of every kind, with random weights."""
    torch.manual_seed(0)
    models = {
        "plain": Transformer(TransformerConfig(**SIZES)),
        "fem": FEMLM(FEMLMConfig(**SIZES)),
        "planned": FreeTransformer(FreeTransformerConfig(**SIZES, n_latent_bits=3)),
        "equilibrium": make_model(vocab_size=257, stability="descent", max_seq_len=192),
    }
    for name, model in models.items():
        save_checkpoint(model, folder / name)
        ByteTokenizer().save(folder / name / "tokenizer")
    return [str(folder / name) for name in models]


@contextlib.contextmanager
def served(arguments, folder):
    """Address of an explorer that runs in ``folder`` as long as the block does."""
    port, settings = free_port(), {"GRADIO_TEMP_DIR": str(folder / "gradio"), "HOME": str(folder)}
    command = [sys.executable, "-m", "helmholtz.cli.main", "explore", *arguments, f"--port={port}"]
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | settings | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    output = folder / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
    try:
        end = time.monotonic() + SECONDS
        while "http://" not in output.read_text():
            assert process.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", output
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    with served(["--checkpoint", *save_models(folder)], folder) as (address, output):
        yield address
    assert "Traceback" not in output.read_text(), output.read_text()


@pytest.fixture
def page(server):
    """A page that has been opened, and what it complained of and asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.complaints, opened.addresses = [], []
        opened.on("console", lambda m: opened.complaints.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.on("request", lambda request: opened.addresses.append(request.url))
        opened.goto(server, wait_until="load")
        yield opened
        browser.close()


def settle(page):
    """Wait until nothing is computed any more."""
    page.wait_for_timeout(250)
    page.wait_for_function(
        "() => !document.querySelector('.generating, .progress-text, .eta-bar')", timeout=1000 * SECONDS
    )


def visible(page, selector):
    return [found for found in page.locator(selector).all() if found.is_visible()]


def move_everything(page):
    """Every control of the open tab, once."""
    moved = 0
    for slider in visible(page, "input[type=range]"):
        before = slider.input_value()
        slider.press("ArrowRight" if before != slider.get_attribute("max") else "ArrowLeft")
        moved += slider.input_value() != before
    for box in visible(page, "input[type=radio]"):
        box.check()
        settle(page)
        moved += 1
    for kind in (
        "#plan-bits tbody input[type=checkbox]",
        ".block:not(#plan-bits) label input[type=checkbox]",
    ):
        for box in visible(page, kind)[:2]:
            box.click()
            settle(page)
            moved += 1
    for number in visible(page, "input[type=number]:not([aria-label*='for'])"):
        number.fill("1")
    for box in visible(page, "textarea, input[data-testid=textbox]"):
        box.fill("to be")
        box.press("Enter")
        moved += 1
    for name in ("Draw another plan", "Continue"):
        for button in visible(page, f"button:has-text('{name}')"):
            button.click()
            moved += 1
    for picture in visible(page, "#energy-picture img"):
        box = picture.bounding_box()
        picture.click(position={"x": 0.7 * box["width"], "y": 0.3 * box["height"]})
        settle(page)
        for name in ("Store the clicked point", "Forget what was stored"):
            page.get_by_role("button", name=name).click()
            settle(page)
        moved += 3
    settle(page)
    return moved


def test_every_control_can_be_moved_and_nothing_is_asked_of_another_host(page, server):
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        settle(page)
        assert move_everything(page) >= 5, tab
        assert not visible(page, ".toast-body.error"), [t.inner_text() for t in visible(page, ".toast-body")]
    assert not page.complaints
    others = [url for url in page.addresses if not url.startswith((server, "data:", "blob:"))]
    assert not others


def test_on_a_phone_nothing_sticks_out(page):
    page.set_viewport_size({"width": 390, "height": 800})
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        narrow = [box for box in page.locator("input[type=range]").all() if box.is_visible()]
        assert all(box.bounding_box()["width"] > 60 for box in narrow), tab


def test_a_click_starts_paths_and_storing_changes_the_picture(page):
    page.get_by_role("tab", name="Equilibrium").click()
    picture = page.locator("#energy-picture img")
    picture.wait_for()
    settle(page)
    before, box = picture.get_attribute("src"), picture.bounding_box()
    assert page.get_by_text("Click into the picture to start").is_visible()
    picture.click(position={"x": 0.6 * box["width"], "y": 0.4 * box["height"]})
    page.get_by_text("plain steps", exact=True).wait_for()
    page.get_by_role("button", name="Store the clicked point").click()
    page.get_by_text("Before 1 pattern was stored").wait_for()
    assert picture.get_attribute("src") != before


def test_flipping_a_bit_marks_what_the_text_owes_to_it(page):
    page.get_by_role("tab", name="Plan").click()
    boxes = page.locator(BITS)
    boxes.first.wait_for()
    settle(page)
    boxes.nth(1).click()
    page.get_by_text("1 bit flipped at 1 token").wait_for()
    assert page.get_by_text("sample 1, changed plan").is_visible()


def test_the_tabs_answer_a_program(server):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(server, verbose=False)
    weights = ["fem", "blocks.0.mixer", "to be", 0, 3]
    page = client.predict(*weights, "beta", 0.5, 2.0, 4, api_name="/weights")
    assert page.count('class="hz-heat') == 5 * 4
    closed = client.predict(*weights, "inner gate", 0.0, 2.0, 4, api_name="/weights")
    assert closed != page
    assert "percentages" in client.predict("planned", "to be", api_name="/encode")
    texts = client.predict(["plain", "fem"], "to be", 8, 0.5, 0, api_name="/compare")
    assert texts.count("hz-card") == 2
    with pytest.raises(Exception, match="at least 2 tokens"):
        client.predict("fem", "blocks.0.mixer", "", 0, 0, "beta", 0.5, 1.0, 4, api_name="/weights")
    client.close()


def test_without_a_run_each_tab_says_how_to_get_one(tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    with served([], tmp_path) as (address, output):
        assert "no run below runs/" in output.read_text()
        client = gradio_client.Client(address, verbose=False)
        parts = [str(part["props"].get("value")) for part in client.config["components"]]
        assert sum("make demo" in part for part in parts) >= 4
        client.close()
