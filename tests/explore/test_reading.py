"""What the tab *Read* shows, without a page."""

import math
import re

import pytest
import torch

from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.explore.reading import channels_shown, layer_names, read_at, read_layer, reading_html
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig

TEXT = "to be <b>"


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    priors = ("softmax", "mamba")
    config = FEMLMConfig(vocab_size=257, d_model=64, n_layers=2, n_heads=2, max_seq_len=32, prior=priors)
    save_checkpoint(model := FEMLM(config).eval(), tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer")
    return Checkpoint(tmp_path, model)


@pytest.fixture
def found(checkpoint):
    return read_layer(checkpoint, TEXT, "blocks.0.mixer")


def test_only_the_layer_that_is_shown_is_taken_apart(checkpoint, found):
    assert layer_names(checkpoint) == ["blocks.0.mixer", "blocks.1.mixer"]
    assert (found.kind, found.n_heads, len(found.words)) == ("softmax", 2, len(TEXT))
    with pytest.raises(ValueError, match="layer must be"):
        read_layer(checkpoint, TEXT, "blocks.9.mixer")


def test_as_trained_it_is_the_reading(found):
    reading, head, query = found, 1, 5
    read = read_at(reading, head, query)
    at = (0, head, query)
    lam = reading.inner[at]
    torch.testing.assert_close(read.free, torch.lerp(reading.mean[at], reading.free[at], lam))
    torch.testing.assert_close(read.beta, reading.beta_star[at])
    torch.testing.assert_close(read.mean, reading.mean[at])
    torch.testing.assert_close(read.kl, read.beta * (read.free - read.mean))


def test_a_closed_gate_reads_as_attention_and_an_open_one_as_beta_max(found):
    closed, opened = (read_at(found, 0, 6, "inner gate", value) for value in (0.0, 1.0))
    torch.testing.assert_close(closed.posterior, closed.prior)
    torch.testing.assert_close(closed.free, closed.mean)
    torch.testing.assert_close(opened.posterior.T, found.posterior[0, 0, 6])
    torch.testing.assert_close(opened.free, found.free[0, 0, 6])


def test_beta_tilts_every_channel_by_its_values(found):
    beta = 3.5
    read, values = read_at(found, 0, 6, "beta", beta), found.values[0, 0].T
    tilted = read.prior * (beta * values).exp()
    torch.testing.assert_close(read.posterior, tilted / tilted.sum(-1, keepdim=True))
    torch.testing.assert_close(read.free, tilted.sum(-1).log() / beta)
    gap = (read.prior * (read.prior / read.posterior).log().nan_to_num()).sum(-1)
    torch.testing.assert_close(read.kl, gap)
    assert (read_at(found, 0, 6, "beta", 10.0).free > read.free).all()


def test_at_beta_0_the_free_energy_is_the_mean(found):
    read = read_at(found, 0, 6, "beta", 0.0)
    torch.testing.assert_close(read.free, read.mean)
    torch.testing.assert_close(read.posterior, read.prior)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [((2, 0), "head must be"), ((0, 99), "query must be"), ((0, 1, "inner gate", 1.5), "inner gate must be"),
     ((0, 1, "beta", -1.0), "beta must be")],
)  # fmt: skip
def test_what_is_not_there_is_refused(found, arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        read_at(found, *arguments)


def test_the_table_has_attentions_row_and_the_channels_that_differ_most(found):
    page = reading_html(found, 0, len(found.words) - 1, "beta", 2.0, 3)
    rows = re.findall(r"<tr[^>]*><td>([^<]*)</td>", page)
    assert rows == ["attention", *map(str, channels_shown(found, 0, len(found.words) - 1, 3))]
    assert page.count('class="hz-heat') == 4 * len(found.words)
    assert "&lt;" in page and "<b>" not in page
    widths = [float(weight) for weight in re.findall(r"--w:([\d.]+)", page)]
    assert sum(widths) == pytest.approx(4, abs=0.05)


def test_every_row_has_a_cell_per_column_and_later_tokens_have_none(checkpoint, found):
    other = read_layer(checkpoint, TEXT, "blocks.1.mixer")
    for shown in (found, other):
        page = reading_html(shown, 0, 2)
        head, *rows = page.split("<tr")[1:]
        assert {row.count("<td") for row in rows} == {head.count("<th")} == {1 + 3 + 6}
    assert "prior (mean)" in reading_html(other, 0, 2)


def test_the_first_token_has_no_temperature(found):
    read = read_at(found, 0, 0)
    assert all(map(math.isnan, read.beta.tolist()))
    assert "nan" not in reading_html(found, 0, 0)


def test_a_text_that_is_too_long_is_refused(checkpoint):
    with pytest.raises(ValueError, match="at most 32"):
        read_layer(checkpoint, "x" * 33, "blocks.0.mixer")
