"""The widget of a reading: the table that is there without a script, and in Chromium what its sliders show."""

import json
import re

import pytest
import torch

from browser import Browser, find_chromium
from helmholtz import FreeEnergyMixer, FreeEnergyMixerConfig, inspect_read
from helmholtz._notebook.reading import MOST_TOKENS, read_at, reading_html, reading_table
from helmholtz.layers import Attention

WORDS = ("to", "be", "<b>", "or", "not", "&", "to")


def reading_of(prior, words=WORDS, **config):
    torch.manual_seed(0)
    if prior == "attention":
        mixer = Attention(32, 2)
    else:
        mixer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=32, n_heads=2, prior=prior, **config))
    with torch.no_grad():
        mixer.in_proj.weight.mul_(8)  # so that the channels differ
    return inspect_read(mixer, torch.randn(2, len(words), 32), words=words)


def cells_of(page):
    """The text of each row's cells."""
    rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("prior", ["softmax", "gla", "mamba", "attention"])
def test_without_a_script_the_table_of_the_most_selective_head_is_there(prior):
    reading = reading_of(prior)
    page = reading_html(reading)
    data = data_of(page)
    assert data["head"] == int(reading.kl[0].mean(dim=(1, 2)).argmax())
    last = len(WORDS) - 1
    table = reading_table(reading, read_at(reading, data["head"], last), last, data["channels"][data["head"]])
    assert table in page
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_attention_reads_the_same_weights_in_every_channel_until_beta_is_set():
    reading = reading_of("attention")
    torch.testing.assert_close(read_at(reading, 1, 4).posterior, reading.prior[0, 1, 4].T)
    assert reading.kind == "attention" and (reading.inner == 0).all()
    tilted = read_at(reading, 1, 4, "beta", 5.0)
    assert (tilted.free > tilted.mean).all()


def test_attentions_weights_are_those_of_the_layer():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, n_kv_heads=2), torch.randn(2, 9, 32)
    reading = inspect_read(layer, x)
    read = reading.mean.transpose(1, 2).flatten(2).float()
    torch.testing.assert_close(layer.o_proj(read), layer(x), rtol=1e-5, atol=1e-6)


def test_a_long_text_is_cut_and_words_are_counted():
    reading = reading_of("mamba", ["w"] * (MOST_TOKENS + 5))
    data = data_of(reading_html(reading, row=1))
    assert data["shape"][2] == len(data["words"]) == MOST_TOKENS
    assert data["shape"][1] == 4 and len(data["prior"]) < 500_000
    mixer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=32, n_heads=2))
    with pytest.raises(ValueError, match="words must be 7, one per token"):
        inspect_read(mixer, torch.randn(1, 7, 32), words=["a"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no chromium on the path: apt-get install -y chromium")
    opened = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


MOVE = """(() => {{
  const root = document.querySelectorAll(".hz-reading")[{index}];
  const input = root.querySelector("input[name={name}]");
  input.value = {value};
  input.dispatchEvent(new Event("input"));
  return root.querySelector(".hz-shown").innerHTML;
}})()"""
PAGE = (
    '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<style>:root {{color-scheme: light dark}}</style><body>{}"
)


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_sliders_show_what_python_computes(browser, tmp_path, width, dark):
    readings = [reading_of("softmax"), reading_of("mamba"), reading_of("gla", causal=False)]
    file = tmp_path / "page.html"
    file.write_text(PAGE.format("".join(map(reading_html, readings))), encoding="utf-8")
    browser.open(file, width, dark=dark)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [file.absolute().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for index, reading in enumerate(readings):
        channels = data_of(reading_html(reading))["channels"]

        def table(head, query, *knob, reading=reading, channels=channels):
            return cells_of(
                reading_table(reading, read_at(reading, head, query, *knob), query, channels[head])
            )

        def moved(name, value, index=index):
            return cells_of(browser.evaluate(MOVE.format(index=index, name=name, value=value)))

        last = len(WORDS) - 1
        assert moved("head", 0) == table(0, last)
        assert moved("head", 1) == table(1, last)
        assert moved("query", 3) == table(1, 3)
        assert moved("beta", 7.5) == table(1, 3, "beta", 7.5)
        assert moved("beta", 0) == table(1, 3, "beta", 0.0)
        assert moved("gate", 0.25) == table(1, 3, "inner gate", 0.25)
        assert moved("query", 0) == table(1, 0, "inner gate", 0.25)
    browser.screenshot(tmp_path / "widget.png", width=width, height=800)
