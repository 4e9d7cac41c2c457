"""Every command with the two Mamba models: train, resume, evaluate, generate, compare, inspect."""

import json
import re
import warnings
from pathlib import Path

import pytest
import yaml

from helmholtz.cli.main import main
from helmholtz.models import MODELS, MambaHopfield
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.solvers import ConvergenceWarning
from tiny_runs import write_text

SIZES = {"d_model": 16, "n_layers": 1, "d_state": 4, "d_head": 8, "max_seq_len": 64}
EQUILIBRIUM = {
    "energy_weight": 0.01, "stability_weight": 0.1, "contraction_target": 0.2, "memory_write_step": 2,
    "curriculum": [
        {"from_step": 0, "max_steps": 3, "rtol": 1.0e-1}, {"from_step": 2, "max_steps": 20, "rtol": 1.0e-3},
    ],
}  # fmt: skip


def description(folder, name):
    """The YAML file's content for one model."""
    models = {
        "mamba": SIZES,
        "mamba_hopfield": SIZES | {"n_patterns": 12, "n_slots": 6, "solver": {"max_steps": 20}},
    }
    return {
        "data": {
            "folder": str(folder / "data"), "sources": [str(folder / "text.txt")], "tokenizer": "bytes",
            "validation_fraction": 0.1,
        },
        "model": {"architecture": name} | models[name],
        "train": {
            "output_dir": str(folder / name), "steps": 6, "batch_size": 2, "seq_len": 16, "warmup_steps": 1,
            "eval_every": 3, "save_every": 2, "eval_tokens": 100,
        },
    } | ({"objective": EQUILIBRIUM} if name == "mamba_hopfield" else {})  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    write_text(folder / "text.txt")
    for name in ("mamba", "mamba_hopfield"):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(description(folder, name)))
        if name == "mamba":
            assert main(["data", f"--config={file}"]) == 0
        assert main(["train", f"--config={file}"]) == 0
    return folder


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_is_what_the_file_describes(workspace):
    for name in ("mamba", "mamba_hopfield"):
        identity = json.loads((workspace / name / "run.json").read_text())["identity"]
        assert identity["architecture"] == name
        assert identity["model"]["d_state"] == 4
    assert identity["objective"]["curriculum"] == EQUILIBRIUM["curriculum"]
    assert identity["model"]["solver"]["max_steps"] == 20
    steps = [r for r in records(workspace / "mamba_hopfield") if r["kind"] == "step"]
    assert set(steps[0]["terms"]) == {
        "cross_entropy", "energy", "convergence", "stability", "num_steps", "unconverged"
    }  # fmt: skip
    evaluation = records(workspace / "mamba_hopfield")[-1]
    assert evaluation["statistics"]["converged"] == 1
    assert evaluation["warnings"] == {}
    model = load_checkpoint(workspace / "mamba_hopfield" / "last")
    assert isinstance(model, MambaHopfield)
    assert model.memory.occupied.any(), "what training wrote is in the checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective.energy_weigth=1"], "did you mean 'objective.energy_weight'?"),
        (["--objective.kappa_bits=1"], "unknown option --objective.kappa_bits"),
        (["--objective.energy_weight=-1"], "objective.energy_weight must be a finite number of at least 0, got -1.0"),
        (["--objective.curriculum=[{from_step: 0, max_steps: 0, rtol: 0.1}]"],
         "objective.curriculum.max_steps must be an integer of at least 1, got 0"),
        (["--objective.curriculum=[{from_step: 0, max_step: 3, rtol: 0.1}]"], "objective.curriculum"),
        (["--objective.curriculum=[{from_step: 7, max_steps: 1, rtol: 0.1}]"],
         "objective.curriculum.from_step must be at most train.steps = 6, got 7"),
        (["--objective.memory_write_step=7"], "objective.memory_write_step must be at most train.steps = 6, got 7"),
        (["--model.n_slots=0"], "objective.memory_write_step must be absent without writable patterns"),
        (["--model.solver.mode=newton"], "newton"),
        (["--model.solver.rtol=0"], "rtol must be a finite number above 0, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_setting(workspace, capsys, tmp_path, arguments, message):
    output = f"--train.output_dir={tmp_path / 'run'}"
    code, _, err = call(capsys, "train", f"--config={workspace / 'mamba_hopfield.yaml'}", output, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mamba_has_no_objective(workspace, capsys):
    code, _, err = call(
        capsys, "train", f"--config={workspace / 'mamba.yaml'}", "--objective.energy_weight=1"
    )
    assert code == 2
    assert "unknown option --objective.energy_weight" in err


def test_interrupted_and_resumed_it_is_the_same_run_to_the_bit(workspace, capsys, tmp_path, monkeypatch):
    from helmholtz.training.loop import Trainer

    make_step = Trainer.make_step

    def crash(self):
        if self.progress.step == 5:
            raise ZeroDivisionError("the machine is gone")
        make_step(self)

    arguments = [f"--config={workspace / 'mamba_hopfield.yaml'}", f"--train.output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(Trainer, "make_step", crash)
    with pytest.raises(ZeroDivisionError):
        main(["train", *arguments])
    monkeypatch.undo()
    assert call(capsys, "train", *arguments, "--train.resume=auto")[0] == 0
    one, two = (
        [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records(folder)]
        for folder in (workspace / "mamba_hopfield", tmp_path / "run")
    )
    assert one == two
    states = [
        load_checkpoint(f / "last").state_dict() for f in (workspace / "mamba_hopfield", tmp_path / "run")
    ]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", ["mamba", "mamba_hopfield"])
def test_evaluate_and_generate(workspace, capsys, name):
    code, out, _ = call(capsys, "evaluate", f"--checkpoint={workspace / name}", "--json")
    assert code == 0
    assert 1 < json.loads(out)["bits_per_byte"] < 12
    arguments = [
        "generate",
        f"--checkpoint={workspace / name}",
        "--prompt=the king",
        "--sampling.max_new_tokens=8",
    ]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert out.startswith("the king")
    assert call(capsys, *arguments)[1] == out


def test_an_evaluation_and_a_generation_say_once_how_many_tokens_did_not_converge(
    workspace, capsys, tmp_path
):
    """With a tolerance that one step cannot reach."""
    from helmholtz.models.checkpoint import save_checkpoint

    model = load_checkpoint(workspace / "mamba_hopfield" / "best")
    values = model.config.to_dict()
    values["solver"] |= {"max_steps": 1, "rtol": 1e-9}
    changed = MambaHopfield(model.config.from_dict(values))
    changed.load_state_dict(model.state_dict())
    save_checkpoint(changed, tmp_path / "one_step")
    tokenizer = workspace / "mamba_hopfield" / "best" / "tokenizer"
    (tmp_path / "one_step" / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        (tmp_path / "one_step" / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for command in (
        ["evaluate", f"--data={workspace / 'data'}", "--batch_size=2"],
        ["generate", "--prompt=the king", "--sampling.max_new_tokens=4"],
        ["inspect", "--text=the king shall speak"],
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert call(capsys, command[0], f"--checkpoint={tmp_path / 'one_step'}", *command[1:])[0] == 0
        messages = [str(w.message) for w in caught if w.category is ConvergenceWarning]
        # decoding speed is measured in calls of its own
        assert 1 <= len(messages) <= (3 if command[0] == "evaluate" else 1), command
        assert re.match(r"[\d,]+ of [\d,]+ tokens did not converge", messages[0])


def test_compare_puts_them_side_by_side(workspace, capsys, tmp_path):
    runs = [workspace / name for name in ("mamba", "mamba_hopfield")]
    code, out, _ = call(capsys, "compare", "--runs", *runs, f"--output={tmp_path}", "--allow_unequal")
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == ["mamba", "mamba_hopfield"]
    assert all(row["kind"] == "exact" for row in results["rows"])
    assert {"equilibrium", "context_norm"} <= results["rows"][1]["parts"].keys()


def test_inspect_shows_what_the_equilibrium_has_learned_and_where_a_text_comes_to_rest(workspace, capsys):
    arguments = ["inspect", f"--checkpoint={workspace / 'mamba_hopfield'}"]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    for part in ("kappa", "strength", "contraction_bound", "equilibrium.memory", "of the baseline block's"):
        assert part in out
    assert "mean_steps" not in out
    code, out, _ = call(capsys, *arguments, "--text=the king shall speak of war")
    assert code == 0
    for part in ("mean_steps", "retrieval_entropy", "lipschitz_certificate", "at 27 tokens"):
        assert part in out
    assert call(capsys, *arguments, "--text=x")[0] == 2
    assert call(capsys, "inspect", f"--checkpoint={workspace / 'mamba'}")[0] == 0
    code, _, err = call(capsys, "inspect", f"--checkpoint={workspace / 'mamba'}", "--text=the king")
    assert code == 2
    assert "no Free Energy Mixer and no equilibrium" in err


# --- the committed configs

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"


@pytest.mark.parametrize("name", ["mamba", "mamba_hopfield"])
def test_the_demos_models_have_the_budget_of_the_others(name):
    import torch

    from helmholtz.cli.arguments import parse
    from helmholtz.cli.runs import run_parser

    def settings(file):
        arguments = [f"--config={CONFIGS}.yaml", f"--config={CONFIGS / file}"]
        return parse(run_parser("train", "", arguments), arguments)

    def parameters(values):
        model = dict(values["model"])
        cls = MODELS[model.pop("architecture")]
        with torch.device("meta"):
            built = cls(cls.config_class.from_dict(model | {"vocab_size": 2048}))
        return sum(p.numel() for p in built.parameters())

    mine, baseline = settings(f"{name}.yaml"), settings("baseline.yaml")
    assert parameters(mine) == pytest.approx(parameters(baseline), rel=0.005)
    assert mine["data"] == baseline["data"]
    assert mine["train"] | {"output_dir": ""} == baseline["train"] | {"output_dir": ""}
