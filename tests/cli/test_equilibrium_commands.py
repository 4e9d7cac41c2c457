import json

import pytest
import torch

from equilibrium_cases import make_model
from helmholtz.cli.landscape import read_tokens
from helmholtz.cli.main import main
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.checkpoints import open_checkpoint
from helmholtz.evals.landscape import EnergyLandscapeAnalyzer
from helmholtz.layers.dynamics import TokenDynamics
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.transformer import Transformer, TransformerConfig

TESTS = [
    "contraction", "energy_descent", "stability", "uniqueness", "lyapunov", "residual_energy", "gradient", "causality",
]  # fmt: skip
SMALL = [
    "--model.vocab_size=30", "--model.d_model=16", "--model.d_state=4", "--model.d_head=8", "--model.n_layers=1",
    "--model.n_patterns=9", "--batch=1", "--time=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equilibria") / "checkpoint"
    save_checkpoint(make_model(vocab_size=ByteTokenizer.vocab_size), folder)
    ByteTokenizer().save(folder / "tokenizer")
    return folder


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_fresh_model_is_validated_line_by_line(capsys, tmp_path):
    file = tmp_path / "results" / "report.json"
    code, out, _ = call(capsys, "validate", "--fresh", *SMALL, f"--output={file}")
    assert code == 0, out
    assert "FAILED" not in out and out.count("passed") > 25
    assert all(f"\n{name} " in out for name in TESTS)
    assert "contractive regime" in out and "all tests passed" in out
    report = json.loads(file.read_text())
    assert report["all_passed"] is True and report["model"]["d_model"] == 16
    assert [name for name in report if name in TESTS] == TESTS


def test_a_checkpoint_is_validated_on_a_text(capsys, checkpoint):
    code, out, _ = call(capsys, "validate", f"--checkpoint={checkpoint}", "--text=to be", "--json")
    report = json.loads(out)
    assert code == 0 and report["stability"]["tested_equilibria"] == len("to be")
    assert report["checkpoint"] == str(checkpoint)


def test_what_fails_is_named_and_the_exit_code_is_1(capsys, monkeypatch):
    original = TokenDynamics.energy_parameters

    def stronger(self, *held):
        parameters = original(self, *held)
        return parameters._replace(strength=3 * parameters.strength)

    monkeypatch.setattr(TokenDynamics, "energy_parameters", stronger)
    code, out, _ = call(capsys, "validate", "--fresh", *SMALL)
    assert code == 1
    assert out.count("FAILED") == 1 and "failed: contraction" in out


def test_one_tokens_landscape_is_drawn_and_written(capsys, checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    arguments = [f"--checkpoint={checkpoint}", "--token=3", f"--output={folder}", "--resolution=11"]
    code, out, _ = call(capsys, "landscape", "--text=to be or", *arguments)
    assert code == 0 and f"in {folder}" in out
    for name in ("slice", "trajectories", "basins", "memory"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "landscape.json").read_text())
    assert content["tokens"] == list(b"to be or") and content["token"] == 3
    assert content["slice"]["lowest"] == pytest.approx([0, 0], abs=1e-9)
    assert content["basins"]["shares"] == [1.0] and content["basins"]["solver_agrees"] == 1
    assert content["trajectories"]["paths"]["picard"]["residual"][-1] <= 1e-8
    assert [point["kind"] for point in content["critical_points"]] == ["minimum"]
    tokens = torch.tensor([list(b"to be or")])
    found = EnergyLandscapeAnalyzer.of(load_checkpoint(checkpoint), tokens).trajectories(token=3)
    assert content["trajectories"]["certificate"] == pytest.approx(found.certificate)


def test_tokens_may_be_given_by_their_ids(checkpoint):
    opened = open_checkpoint(str(checkpoint))
    by_ids = read_tokens({"text": None, "ids": [98, 101], "token": -2}, opened)
    by_text = read_tokens({"text": "be", "ids": None, "token": -2}, opened)
    assert torch.equal(by_ids[0], by_text[0])
    assert (by_ids[1], by_text[1]) == ("token 0, id 98", "token 0, 'b'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "checkpoint and fresh: wanted one of them"),
        (["validate", "--fresh", "--checkpoint=CHECKPOINT"], "checkpoint and fresh: wanted one of them"),
        (["validate", "--checkpoint=CHECKPOINT", "--model.d_model=32"], "model.d_model and checkpoint: a saved model"),
        (["validate", "--fresh", "--text=a"], "text and fresh: a new model has no tokenizer"),
        (["validate", "--checkpoint=CHECKPOINT", "--text=abc", "--time=9"], "time and text: time is of random tokens"),
        (["validate", "--checkpoint=CHECKPOINT", "--text=a"], "text must be at least 2 tokens"),
        (["validate", "--fresh", "--seed=-1"], "seed must be an integer of at least 0, got -1"),
        (["validate", "--checkpoint=OTHER"], "has no equilibrium"),
        (["landscape", "--checkpoint=OTHER", "--text=a", "--output=x"], "has no equilibrium"),
        (["landscape", "--checkpoint=CHECKPOINT", "--output=x"], "text and ids: wanted one of them"),
        (["landscape", "--checkpoint=CHECKPOINT", "--text=", "--output=x"], "text or ids must be not empty, got ''"),
        (["landscape", "--checkpoint=CHECKPOINT", "--text=ab", "--token=2", "--output=x"], "token must be in [-2, 2)"),
        (["landscape", "--checkpoint=CHECKPOINT", "--text=ab", "--resolution=4", "--output=x"], "must be odd"),
        (["landscape", "--checkpoint=CHECKPOINT", "--text=ab", "--basis=all", "--output=x"], "basis"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_exit_code_2(
    capsys, checkpoint, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    if "--checkpoint=OTHER" in arguments:
        config = TransformerConfig(vocab_size=ByteTokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2)
        save_checkpoint(Transformer(config), tmp_path / "other")
        ByteTokenizer().save(tmp_path / "other" / "tokenizer")
    places = {
        "--checkpoint=OTHER": f"--checkpoint={tmp_path / 'other'}",
        "--checkpoint=CHECKPOINT": f"--checkpoint={checkpoint}",
    }
    code, out, err = call(capsys, *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"helmholtz {arguments[0]}: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.glob("x*"))
