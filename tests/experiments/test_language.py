"""The language study: equal parameters, a queue that gives equal bytes, slopes with their errors."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.experiments.language import run as language
from helmholtz.experiments.language.models import LANGUAGE_MODELS, SIZES, Size, model_config, n_parameters
from helmholtz.experiments.language.run import (
    CORPORA,
    TOKENIZERS,
    Curve,
    LanguageStudy,
    compute_language,
    fit_slope,
    language_runs,
    scaling_fits,
)
from helmholtz.experiments.queue import FinishedRun, QueuedRun, run_queue
from helmholtz.training.callbacks import EvalRecord, StepRecord

TINY = LanguageStudy(
    steps=4,
    batch_size=2,
    seq_len=16,
    warmup_steps=1,
    eval_every=2,
    eval_tokens=64,
    measured_tokens=64,
    plans=2,
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A text of a few lines in place of the two."""
    (tmp_path / "text.txt").write_text("".join(f"the {n}th line of a small text\n" for n in range(200)))
    config = DataConfig(
        folder=str(tmp_path / "data"), sources=(str(tmp_path / "text.txt"),), tokenizer="bytes"
    )
    prepared = prepare(config)
    monkeypatch.setattr(language, "prepare_corpus", lambda corpus, tokenizer, folder: prepared)
    monkeypatch.setitem(SIZES, "m", Size(32, 2))
    return tmp_path


@pytest.mark.parametrize("vocab_size", [257, 1024])
def test_models_of_a_size_have_the_parameters_of_its_baseline(vocab_size):
    counts = {
        name: n_parameters(
            row.architecture, model_config(name, SIZES["m"], vocab_size=vocab_size, max_seq_len=128)
        )
        for name, row in LANGUAGE_MODELS.items()
    }
    assert max(counts.values()) < 1.01 * min(counts.values())
    assert 100_000 < counts["baseline"] < 400_000


def test_a_size_without_room_is_refused():
    with pytest.raises(ValueError, match="n_patterns: 67,872 parameters cannot be matched"):
        model_config("mamba_hopfield", SIZES["s"], vocab_size=257, max_seq_len=128)
    with pytest.raises(ValueError, match="models must be one of"):
        model_config("lstm", SIZES["s"], vocab_size=257, max_seq_len=128)


def test_the_grid_has_seeds_outermost_and_scaling_last():
    runs = language_runs(LanguageStudy())
    per_seed = len(CORPORA) * len(TOKENIZERS) * len(LANGUAGE_MODELS) + 2 * 3
    assert len(runs) == 3 * per_seed == len({run.name for run in runs}) == 90
    assert {run.settings["seed"] for run in runs[:per_seed]} == {0}
    assert [run.settings["size"] for run in runs[per_seed - 6 : per_seed]] == ["s"] * 3 + ["l"] * 3
    assert runs[0].name == "shakespeare-bytes-m-baseline-0"
    few = language_runs(LanguageStudy(), corpora=["king_james"], models=["mamba"], seeds=[5])
    assert [run.name for run in few] == ["king_james-bytes-m-mamba-5", "king_james-bpe-m-mamba-5"]
    for wrong in ({"corpora": ["x"]}, {"tokenizers": ["x"]}, {"models": ["x"]}, {"seeds": [-1]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            language_runs(LanguageStudy(), **wrong)


def test_a_run_leaves_a_curve_a_bound_for_plans_and_the_same_bytes_again(corpus):
    names = {"corpora": ["shakespeare"], "tokenizers": ["bytes"], "seeds": [0]}
    runs = [
        run
        for run in language_runs(TINY, models=["fem_softmax", "free_transformer"], **names)
        if run.settings["size"] == "m"
    ]
    for folder in ("one", "two"):
        compute = partial(compute_language, data=corpus, folder=corpus / folder)
        assert run_queue(runs if folder == "one" else runs[1:], compute, corpus / folder) in (1, 2)
    exact, bound = (
        json.loads((corpus / "one" / "results" / f"{run.name}.json").read_text())["result"] for run in runs
    )
    assert exact["kind"] == "exact" and exact["bounds"] is None
    assert [point["step"] for point in exact["curve"]] == [2, 4]
    assert [point["tokens"] for point in exact["curve"]] == [64, 128]
    assert bound["kind"] == "bound" and bound["bits_per_byte"] == bound["bounds"]["mixture_weighted"]
    assert bound["bounds"]["prior_cross_entropy"] > 0 and bound["bounds"]["kl_bits_per_token"] >= 0
    assert 3 < exact["bits_per_byte"] < 9
    again = f"results/{runs[1].name}.json"
    assert (corpus / "one" / again).read_bytes() == (corpus / "two" / again).read_bytes()
    beside = json.loads((corpus / "one" / "timings" / f"{runs[0].name}.curve.json").read_text())[
        "cpu_seconds"
    ]
    assert len(beside) == 2 and 0 < beside[0] < beside[1]


def finished(model, size, parameters, bits):
    settings = {"model": model, "size": size, "corpus": "shakespeare", "tokenizer": "bytes"}
    run = QueuedRun(f"{model}-{size}-{bits}", settings)
    return FinishedRun(run, {"parameters": parameters, "bits_per_byte": bits}, {})


def test_slopes_are_per_tenfold_and_their_errors_those_of_the_line():
    done = [
        finished("baseline", size, 10**power, 5 - 0.5 * power + shift)
        for power, size in ((4, "s"), (5, "m"), (6, "l"))
        for shift in (-0.01, 0.01)
    ]
    (fit,) = scaling_fits(done)
    assert fit["model"] == "baseline" and fit["runs"] == 6
    assert fit["slope"] == pytest.approx(-0.5)
    assert fit["standard_error"] == pytest.approx((6 * 1e-4 / 4 / 4) ** 0.5)
    assert scaling_fits(done[:4]) == []
    other = replace(done[0], run=replace(done[0].run, settings={**done[0].run.settings, "tokenizer": "bpe"}))
    assert scaling_fits([other, *done[1:]])[0]["runs"] == 5
    with pytest.raises(ValueError, match="points"):
        fit_slope(np.array([1.0, 2.0]), np.array([1.0, 2.0]))


def test_a_run_that_a_signal_ends_is_no_result(corpus, monkeypatch):
    class Interrupting(language.Curve):
        def on_step(self, record):
            if record.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(language, "Curve", Interrupting)
    runs = language_runs(TINY, corpora=["shakespeare"], tokenizers=["bytes"], models=["baseline"], seeds=[0])[
        :1
    ]
    compute = partial(compute_language, data=corpus, folder=corpus / "out")
    with pytest.raises(RuntimeError, match="bytes-m-baseline-0 was interrupted at step 2; the same command"):
        run_queue(runs, compute, corpus / "out")
    assert not list((corpus / "out").rglob("*.json"))


def test_a_curve_counts_the_seconds_of_steps_alone(monkeypatch):
    """Neither what comes before the end of the first step nor evaluations."""
    clock = iter([100.0, 103.0, 103.5, 110.0, 112.0, 112.5])  # step, step, eval's end, step, step, eval's end
    monkeypatch.setattr("helmholtz.experiments.language.run.time.process_time", lambda: next(clock))
    curve = Curve()
    step = StepRecord(1, 1, loss=1.0, bits_per_byte=1.0, grad_norm=1.0, lr=1.0, tokens_per_second=1.0)
    evaluation = EvalRecord(1, 1, validation_loss=1.0, validation_bits_per_byte=1.0, best=True)
    for _ in range(2):
        curve.on_step(step)
        curve.on_step(step)
        curve.on_eval(evaluation)
    assert curve.seconds == [3.0, 3.0 + 6.5 + 2.0]
