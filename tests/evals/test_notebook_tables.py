"""Plans and equilibria as a notebook shows them."""

import re

import torch

from equilibrium_cases import make_model
from helmholtz.evals.equilibria import equilibrium_of
from helmholtz.evals.plan_file import PlanFile, read_plan
from helmholtz.layers.latent import Plan
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig


def rows_of(page):
    return [re.sub("<.*?>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]


def test_a_plan_shows_a_row_of_bits_per_bit():
    page = Plan(torch.tensor([[5, 0, 2], [1, 1, 1]]))._repr_html_()
    assert rows_of(page)[1:] == [
        ["bit", "0", "1", "0", "0"],
        ["bit", "1", "0", "0", "1"],
        ["bit", "2", "1", "0", "0"],
    ]
    assert len(rows_of(Plan(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 6))._repr_html_())) == 7


def test_a_plan_on_disk_shows_its_words():
    plan = PlanFile(
        n_latent_bits=2, codes=(3, 0), tokens=(7, 8), texts=("<i>", "b"), seed=0, fingerprint=None
    )
    page = plan._repr_html_()
    assert "0: &lt;i&gt;" in page and "<i>" not in page
    assert rows_of(page)[1:] == [["bit", "0", "1", "0"], ["bit", "1", "1", "0"]]


def test_a_plan_that_was_read_shows_how_sure_the_encoder_was():
    torch.manual_seed(0)
    model = FreeTransformer(
        FreeTransformerConfig(vocab_size=11, d_model=32, n_layers=2, n_heads=2, n_latent_bits=3)
    )
    page = read_plan(model, [3, 1, 4, 1])._repr_html_()
    head, *rows = rows_of(page)
    assert head == ["token", "bit", "0", "bit", "1", "bit", "2", "KL,", "bits"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert "at most 3 bits" in page


def test_an_equilibrium_shows_how_each_token_was_solved():
    torch.manual_seed(0)
    found = equilibrium_of(make_model(vocab_size=11), torch.tensor([[3, 1, 4, 1, 5]]))
    page = found._repr_html_()
    _, *rows = rows_of(page)
    assert [row[:3] for row in rows] == [
        [str(place), "converged", str(steps)] for place, steps in enumerate(found.num_steps[0].tolist())
    ]
    assert "5 of 5 tokens converged" in page


def test_pads_have_no_row():
    model = make_model(vocab_size=11)
    mask = torch.tensor([[False, True, True]])
    with torch.no_grad():
        found = model(torch.tensor([[3, 1, 4]]), attention_mask=mask).equilibrium
    _, *rows = rows_of(found._repr_html_())
    assert [row[0] for row in rows] == ["1", "2"]
    assert "2 of 2 tokens converged" in found._repr_html_()
