"""What the tab *Compare* shows, without a page."""

import pytest
import torch

from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.explore.compare import Continuation, continued, loss_picture, losses_html, texts_html
from helmholtz.explore.runs import offer
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has ended, and a bare checkpoint."""
    folder = tmp_path_factory.mktemp("compare")
    train(tiny_run(prepare_text(folder), folder / "run", steps=4, eval_every=2))
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
    save_checkpoint(Transformer(config), folder / "bare")
    ByteTokenizer().save(folder / "bare" / "tokenizer")
    return list(offer([folder / "run", folder / "bare"]).runs.values())


def test_a_continuation_is_what_generate_gives(runs):
    found = continued(runs[1], "ab", n_new=6, temperature=0.5, seed=3)
    checkpoint = runs[1].checkpoint
    settings = SamplingSettings(max_new_tokens=6, temperature=0.5, seed=3, stop_tokens=(256,))
    assert [list(found.tokens)] == generate(checkpoint.model, [checkpoint.document("ab")], settings)
    assert found.tokens_per_second == pytest.approx(len(found.tokens) / found.seconds)


def test_texts_are_escaped_and_have_their_speed(runs):
    found = [Continuation("run", tuple(b"<b>"), 0.5), Continuation("bare", (), 1.0)]
    page = texts_html(runs, "<i>", found)
    assert "&lt;i&gt;" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert "run: 3 tokens at 6 per second" in page


def test_losses_are_those_of_training_and_open_where_there_was_none(runs):
    page = losses_html(runs)
    head, run, bare = page.split("<tr>")[1:]
    assert head.count("<th>") == run.count("<td>") == bare.count("<td>") == 6
    assert bare.count("–") == 3
    assert "–" not in run


def test_curves_are_drawn_of_runs_that_have_ended(runs):
    pytest.importorskip("matplotlib")
    assert loss_picture(runs).mode == "RGB"
    assert loss_picture(runs[1:]) is None
