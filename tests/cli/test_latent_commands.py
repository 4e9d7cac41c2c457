"""evaluate, compare and inspect of a model with a plan, next to one without."""

import json

import pytest
import yaml

from helmholtz.cli.main import main
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.latent import bounds_per_byte, evaluate_bounds
from helmholtz.evals.runs import find_checkpoint
from helmholtz.models.checkpoint import load_checkpoint
from tiny_runs import write_text


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Finished runs: ``plain``, a decoder, and ``planned``, a Free Transformer."""
    folder = tmp_path_factory.mktemp("workspace")
    data = {
        "folder": str(folder / "data"),
        "sources": [str(write_text(folder / "text.txt", n_words=1600))],
        "tokenizer": "bytes",
        "validation_fraction": 0.1,
    }
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
    training = {
        "steps": 4,
        "batch_size": 4,
        "seq_len": 32,
        "warmup_steps": 1,
        "eval_every": 2,
        "eval_tokens": 100,
    }
    for name, architecture in (("plain", "transformer"), ("planned", "free_transformer")):
        config = {
            "data": data,
            "model": sizes | {"architecture": architecture},
            "train": training | {"output_dir": str(folder / name), "save_every": 4},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        if name == "plain":
            assert main(["data", f"--config={folder / 'plain.yaml'}"]) == 0
        assert main(["train", f"--config={folder / f'{name}.yaml'}"]) == 0
    return folder


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_evaluate_prints_bounds_and_says_what_leaks(workspace, capsys):
    arguments = ["evaluate", f"--checkpoint={workspace / 'planned'}", "--n_samples=3", "--seq_len=32"]
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    model = load_checkpoint(find_checkpoint(workspace / "planned"))
    data = TokenDataset(workspace / "data", "validation")
    bounds = evaluate_bounds(model, data, seq_len=32, n_samples=3)
    assert found["importance_weighted"] == pytest.approx(bounds.importance_weighted, rel=1e-6)
    assert found["importance_weighted_bits_per_byte"] == pytest.approx(
        bounds_per_byte(bounds)["importance_weighted"], rel=1e-6
    )
    assert (found["n_samples"], found["n_tokens"]) == (3, len(data))
    assert len(found["usage"]["kl_per_bit"]) == 8
    code, out, _ = call(capsys, *arguments)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "leaks: not a language-model loss" in lines["posterior_cross_entropy_leaking"]
    assert f"{found['elbo']:,.4f}" in lines["elbo"] and "upper bound" in lines["elbo"]
    assert len(lines["kl_per_bit"].split()) == 9
    assert {"prior_cross_entropy", "effective_samples", "active_bits", "mutual_information"} <= lines.keys()
    assert (
        "posterior_cross_entropy" not in lines
        and "posterior_cross_entropy_leaking_bits_per_byte" not in lines
    )


def test_evaluate_of_fewer_windows_reads_fewer(workspace, capsys):
    arguments = ["evaluate", f"--checkpoint={workspace / 'planned'}", "--n_samples=1", "--n_windows=2"]
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(out)["n_tokens"] == 2 * 64


@pytest.mark.parametrize(
    ("run", "option", "message"),
    [
        ("plain", "--n_samples=4", "n_samples: this model has no plan"),
        ("plain", "--n_windows=4", "n_windows: this model has no plan"),
        ("planned", "--overlap=8", "overlap: the windows of a model with a plan have none"),
        ("planned", "--n_samples=0", "n_samples must be an integer of at least 1, got 0"),
        ("planned", "--n_windows=100000", "n_windows must be at most the split's"),
        ("planned", "--seq_len=0", "seq_len must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(workspace, capsys, run, option, message):
    code, out, err = call(capsys, "evaluate", f"--checkpoint={workspace / run}", option)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_compare_shows_a_bound_as_a_bound_and_never_the_number_that_leaks(workspace, capsys, tmp_path):
    runs = ["--runs", workspace / "plain", workspace / "planned"]
    code, _, err = call(capsys, "compare", *runs, f"--output={tmp_path}")
    assert code == 2 and "parameters differ by more than 2%" in err
    assert "objective" not in err  # what is minimised is no budget
    code, out, _ = call(capsys, "compare", *runs, f"--output={tmp_path}", "--allow_unequal")
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    plain, planned = results["rows"]
    assert (plain["kind"], plain["bounds"], planned["kind"]) == ("exact", None, "bound")
    bounds = planned["bounds"]
    assert planned["validation_bits_per_byte"] == bounds["mixture_weighted_bits_per_byte"]
    assert bounds["n_tokens"] == len(TokenDataset(workspace / "data", "validation"))
    assert f"<= {planned['validation_bits_per_byte']:.4f}" in out
    assert f"{plain['validation_bits_per_byte']:.4f}" in out
    assert f"{bounds['posterior_cross_entropy_leaking']:.4f}" not in out
    assert "above one it is inconclusive" in out and "windows of 32 tokens without overlap" in out
    assert "free_transformer (0.5 bits)" in out and f"{planned['peak_memory_bytes'] / 2**20:,.0f} MiB" in out
    assert f"encoder {planned['parts']['encoder']:,}, post_sampler {256 * 32:,}" in out
    assert sum(planned["parts"].values()) == planned["parameters"]
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_inspect_lists_the_encoder_and_the_table(workspace, capsys):
    code, out, _ = call(capsys, "inspect", f"--checkpoint={workspace / 'planned'}")
    assert code == 0
    for part in (
        "encoder.query",
        "encoder.block.mixer",
        "encoder.block.mlp",
        "encoder.readout",
        "post_sampler",
    ):
        assert part in out
    code, _, err = call(capsys, "inspect", f"--checkpoint={workspace / 'planned'}", "--text=the king")
    assert code == 2 and "no Free Energy Mixer" in err
