"""One process: settings that change how blocks run, and those that it refuses. Several: ``tests/distributed``."""

import json

import pytest

from distributed_cases import SIZES, distributed_run
from helmholtz.training import run as run_module
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.run import train
from tiny_runs import prepare_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


def run(data, folder, architecture, **parallel):
    train(
        distributed_run(
            data,
            architecture=architecture,
            output=folder,
            train={"steps": 4, "eval_every": 4, "save_every": 4},
            parallel=parallel,
        )
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("architecture", SIZES)
def test_recomputed_activations_change_no_bit(data, tmp_path, architecture):
    kept = run(data, tmp_path / "kept", architecture)
    assert run(data, tmp_path / "recomputed", architecture, recompute_every=1) == kept


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which would end it as errors
def test_compiled_blocks_give_the_same_losses(data, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "transformer", {"n_layers": 1, "n_heads": 2})
    plain = run(data, tmp_path / "plain", "transformer")
    compiled = run(data, tmp_path / "compiled", "transformer", compile=True)
    for one, two in zip(plain, compiled, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 2}, "parallel.replicas must be 1 without parallel.strategy=fsdp, got 2"),
        ({"gather_dtype": "bf16"}, "parallel.gather_dtype must be fp32 without parallel.strategy=fsdp"),
        ({"timeout_seconds": 0}, "parallel.timeout_seconds must be an integer of at least 1, got 0"),
        ({"logits_mb": 0}, "parallel.logits_mb must be an integer of at least 1, got 0"),
        ({"recompute_every": -1}, "parallel.recompute_every must be an integer of at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


def test_shards_need_torchrun(data, tmp_path):
    with pytest.raises(
        ValueError, match="parallel.strategy must be ddp in a process that torchrun has not started"
    ):
        run(data, tmp_path / "run", "transformer", strategy="fsdp")
    assert not (tmp_path / "run").exists()


def test_tf32_is_refused_where_there_is_none(data, tmp_path):
    settings = {"steps": 4, "matmul_precision": "high", "device": "cpu"}
    with pytest.raises(ValueError, match="train.matmul_precision must be highest on the CPU, got 'high'"):
        train(distributed_run(data, architecture="transformer", output=tmp_path / "run", train=settings))


def test_the_setting_for_large_logits_reaches_the_model(data, tmp_path, monkeypatch):
    sizes = []
    made = run_module._trainer

    def trainer(*arguments):
        loop = made(*arguments)
        sizes.append(loop.model.logits_bytes)
        return loop

    monkeypatch.setattr(run_module, "_trainer", trainer)
    run(data, tmp_path / "run", "transformer", logits_mb=3)
    assert sizes == [3 * 2**20]
