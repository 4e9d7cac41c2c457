"""A FEM of all five priors and a Mamba are trained, interrupted, resumed, reloaded and sampled from."""

import json
from dataclasses import replace

import pytest
import torch

from helmholtz.data.tokenizer import load_tokenizer
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.fem_lm import FEMLMConfig
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.mamba import MambaConfig
from helmholtz.training.callbacks import Callback
from helmholtz.training.run import train
from tiny_runs import WORDS, prepare_text, tiny_run

PRIORS = ("softmax", "linear", "gla", "rnn_softmax", "mamba")


MODELS = {
    "fem_lm": FEMLMConfig(
        vocab_size=257, d_model=32, n_layers=5, n_heads=2, d_ff=32, max_seq_len=64, prior=PRIORS, dropout=0.1
    ),
    "mamba": MambaConfig(
        vocab_size=257, d_model=32, n_layers=3, d_state=8, d_head=16, max_seq_len=64, dropout=0.1
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(params=MODELS)
def run(request, data, tmp_path):
    base = tiny_run(
        data, tmp_path, steps=30, seq_len=24, batch_size=4, accumulation=1, lr=1e-2,
        eval_every=10, save_every=10,
    )  # fmt: skip
    return replace(base, architecture=request.param, model=MODELS[request.param])


def into(run, folder, **changes):
    return replace(run, train=replace(run.train, output_dir=str(folder), **changes))


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_it_learns_resumes_exactly_and_speaks(run, tmp_path):
    class Crash(Callback):
        def on_step(self, record):
            if record.step == 13:
                raise ConnectionError("the machine is gone")

    train(into(run, tmp_path / "whole"))
    with pytest.raises(ConnectionError):
        train(into(run, tmp_path / "broken"), callbacks=[Crash()])
    train(into(run, tmp_path / "broken", resume="auto"))
    whole, broken = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert whole == broken
    assert len(whole) == 30
    assert sum(whole[-5:]) < 0.7 * sum(whole[:5])
    one, two = (load_checkpoint(tmp_path / name / "best") for name in ("whole", "broken"))
    for (name, tensor), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    tokenizer = load_tokenizer(tmp_path / "whole" / "best" / "tokenizer")
    (tokens,) = generate(
        one, [tokenizer.encode("the king")], SamplingSettings(max_new_tokens=40, temperature=0)
    )
    letters = {*"".join(WORDS), " ", "\n"}
    assert set(tokenizer.decode(tokens)) <= letters
