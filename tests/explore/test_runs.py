"""Which runs the explorer offers, and what it says where there are none."""

import pytest
import torch

from helmholtz.explore.runs import find_runs, offer, offer_found
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig
from helmholtz.models.transformer import Transformer, TransformerConfig

SIZES = {"vocab_size": 11, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 8}


def make_run(folder, model=None):
    torch.manual_seed(0)
    save_checkpoint(model or Transformer(TransformerConfig(**SIZES)), folder / "best")
    (folder / "run.json").write_text("{}")
    return folder


def test_runs_are_named_by_their_folders_and_sorted_by_what_they_have(tmp_path):
    plain, fem = make_run(tmp_path / "a"), make_run(tmp_path / "b", FEMLM(FEMLMConfig(**SIZES)))
    found = offer([plain, fem, plain])
    assert found.names() == ["a", "b"]
    assert found.names("reader") == ["b", "a"]
    assert found.names("plan") == []
    assert "None of the runs (a, b) has a latent plan" in found.missing("plan")
    assert found.runs["b"].summary.startswith("b: fem_lm, ")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first, second = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert offer([first, second]).names() == [str(first), str(second)]


def test_the_demos_runs_come_before_all_others(tmp_path):
    other = make_run(tmp_path / "other")
    assert find_runs(tmp_path) == [other]
    demo = make_run(tmp_path / "demo" / "fem")
    (tmp_path / "demo" / "begun").mkdir()
    (tmp_path / "demo" / "begun" / "run.json").write_text("{}")
    assert find_runs(tmp_path) == [demo]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad")
    (bad / "best" / "config.json").write_text('{"architecture": "none"}')
    found = offer_found(tmp_path)
    assert found.names() == ["good"]
    assert len(found.left_out) == 1
    with pytest.raises(ValueError):
        offer([bad])


def test_without_runs_every_tab_says_how_to_get_one(tmp_path):
    found = offer_found(tmp_path / "nothing")
    assert not found.runs
    assert "make demo" in found.missing("equilibrium")
