"""What the tab *Plan* shows, without a page."""

import re

import pytest
import torch

from helmholtz._notebook.plan import codes_table
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.evals.plan_file import read_plan
from helmholtz.explore.html import marked
from helmholtz.explore.planning import (
    Request,
    bits_of,
    changed_part,
    changes_note,
    draw_codes,
    encoder_html,
    texts_html,
    with_bits,
    words_of,
    write,
)
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig

REQUEST = Request("ab", n_new=8, n_samples=2)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = FreeTransformerConfig(
        vocab_size=257, d_model=32, n_layers=2, n_heads=2, max_seq_len=64, n_latent_bits=3
    )
    model = FreeTransformer(config).eval()
    with torch.no_grad():
        model.post_sampler.weight.mul_(1000)  # so that a plan matters
    save_checkpoint(model, tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer")
    return Checkpoint(tmp_path, model)


def test_held_bits_have_their_value_in_every_code(checkpoint):
    codes = draw_codes(checkpoint, REQUEST, seed=3, held=[(0, 1), (2, 0)])
    assert len(codes) == 3 + 8
    assert all(code & 1 and not code & 4 for code in codes)
    assert len(set(codes)) > 1
    assert codes != draw_codes(checkpoint, REQUEST, seed=4, held=[(0, 1), (2, 0)])


def test_check_boxes_hold_the_codes(checkpoint):
    codes = draw_codes(checkpoint, REQUEST, seed=0)
    words = words_of(checkpoint, REQUEST, len(codes), write(checkpoint, REQUEST, codes))
    assert words[:3] == ["<end>", "a", "b"]
    assert len(words) == len(codes)
    for place, code in enumerate(codes):
        assert with_bits(codes, place, bits_of(code)) == codes
    assert with_bits((1, 2, 3), 1, [0]) == (1, 1, 3)
    assert with_bits((1, 2, 7), 1, [0, 1], everywhere=True) == (1, 3, 7)
    assert with_bits((1, 2, 7), 2, [0, 2], everywhere=True) == (1, 0, 5)
    with pytest.raises(ValueError, match="token must be"):
        with_bits(codes, 99, [])


def test_the_table_marks_what_was_flipped():
    page = codes_table(["a", "<b>"], (1, 2), (1, 3), 2)
    assert page.count("hz-flipped") == 1
    assert page.count('class="hz-heat') == 4
    assert "<b>" not in page


def test_one_plan_gives_one_text_and_a_flipped_bit_another(checkpoint):
    codes = draw_codes(checkpoint, REQUEST, seed=0)
    before, again = (write(checkpoint, REQUEST, codes) for _ in range(2))
    after = write(checkpoint, REQUEST, tuple(code ^ 7 for code in codes))
    assert [row.tokens for row in before] == [row.tokens for row in again]
    parts = [changed_part(a.tokens, b.tokens) for a, b in zip(before, after, strict=True)]
    assert max(parts) > 0
    page = texts_html(checkpoint, REQUEST, before, after)
    assert page.count("hz-card") == 4
    assert "<mark>" in page
    assert "<mark>" not in texts_html(checkpoint, REQUEST, before, again)
    assert texts_html(checkpoint, REQUEST, before, None).count("hz-card") == 2


def test_a_plan_of_another_length_is_refused(checkpoint):
    with pytest.raises(ValueError, match="plan must be 11"):
        write(checkpoint, REQUEST, (0,) * 4)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"n_new": 1000}, "tokens must be at most"), ({"n_samples": 9}, "samples must be at most")],
)
def test_what_would_not_fit_is_refused(fields, wanted):
    with pytest.raises(ValueError, match=wanted):
        Request("a", **fields)


def test_the_note_counts_what_was_flipped():
    assert "as it was drawn" in changes_note((1, 2), (1, 2))
    assert "3 bits flipped at 2 tokens" in changes_note((0, 7), (3, 6))
    assert "1 bit flipped at 1 token" in changes_note((0, 7), (0, 6))


def test_tokens_that_differ_are_marked_at_their_places():
    tokenizer = ByteTokenizer()
    assert marked(tokenizer, list(b"ab<d"), list(b"aXXd")) == "a<mark>b&lt;</mark>d"
    assert marked(tokenizer, list(b"abc"), list(b"ab")) == "ab<mark>c</mark>"
    assert marked(tokenizer, [], [1]) == ""
    assert marked(tokenizer, list("é".encode()), list("è".encode())).count("<mark>") == 1


def test_the_part_that_changed_counts_the_end():
    assert changed_part([], []) == 0
    assert changed_part([1, 2], [1, 3]) == 0.5
    assert changed_part([1], [1, 2]) == 0.5


def test_the_encoder_of_a_text(checkpoint):
    page = encoder_html(checkpoint, "ab\n")
    chances = read_plan(checkpoint.model, checkpoint.document("ab\n")).probability
    shown = [float(weight) for weight in re.findall(r"--w:([\d.]+)", page)]
    assert shown == pytest.approx(chances.flatten().tolist(), abs=6e-4)
    with pytest.raises(ValueError, match="not empty"):
        encoder_html(checkpoint, "")
    with pytest.raises(ValueError, match="at most 64"):
        encoder_html(checkpoint, "x" * 64)
