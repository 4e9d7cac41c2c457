"""The study of hybrids: equal parameters, the models of the studies it is compared with, equal results again."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.experiments.hybrids import run as hybrids
from helmholtz.experiments.hybrids.models import CONTROLS, FEWER, TEXT_MODELS, letter_model
from helmholtz.experiments.hybrids.run import KAPPAS, LETTER_MIXERS, compute_hybrid, hybrid_runs
from helmholtz.experiments.letters import report as letters
from helmholtz.experiments.letters.run import PROFILES, train_on_letters
from helmholtz.experiments.queue import run_queue, split_finished
from helmholtz.experiments.report.of_hybrids import hybrids as hybrid_section
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig
from study_cases import call_study, contents

CI = PROFILES["ci"]
TINY = replace(
    hybrids.TEXT_SETTINGS["plan"], steps=4, batch_size=2, seq_len=16, warmup_steps=1, eval_tokens=64,
    measured_tokens=64, plans=2, groups=2, group_size=2, sampled_tokens=4,
)  # fmt: skip


def count(config):
    with torch.device("meta"):
        return count_parameters(Decoder(config))


def test_models_that_are_compared_have_equal_parameters():
    configs = {name: m.config(vocab_size=2048, max_seq_len=256) for name, m in TEXT_MODELS.items()}
    counts = {name: count(config) for name, config in configs.items() if name not in FEWER}
    assert max(counts.values()) < 1.01 * min(counts.values()) and counts["attention"] == 1_053_824
    few = [count(configs[name]) for name in FEWER]
    assert max(few) < 1.01 * min(few) < 0.9 * counts["mamba"]
    for planned in (False, True):
        pair = [count(letter_model(mixer, CI, planned=planned)) for mixer in LETTER_MIXERS]
        assert max(pair) < 1.01 * min(pair)


@pytest.mark.parametrize("kappa_bits", [None, 1.0])
def test_letters_of_attention_are_those_of_the_letters_study(kappa_bits):
    """Weights and training to the bit: its results may be compared with these."""
    tiny = replace(CI, steps=2, batch_size=2, warmup_steps=1)
    config = letter_model("attention", tiny, planned=kappa_bits is not None)
    theirs, ours = (
        train_on_letters(tiny, kappa_bits=kappa_bits, seed=0, build=build)
        for build in (None, lambda: Decoder(config))
    )
    found = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, found[name])


def test_the_grid_has_seeds_outermost_and_controls_last():
    runs = hybrid_runs()
    per_seed = len(KAPPAS) * len(LETTER_MIXERS) + len(TEXT_MODELS)
    assert len(runs) == 3 * per_seed == len({run.name for run in runs}) == 48
    assert [run.settings["seed"] for run in runs] == [0] * 10 + [1] * 10 + [2] * 10 + [0] * 6 + [1] * 6 + [
        2
    ] * 6
    assert [run.name for run in runs[:5]] == [
        "letters-attention-1_4-0", "letters-fem-1_4-0", "letters-attention-1-0", "letters-fem-1-0",
        "shakespeare-attention_plan-0",
    ]  # fmt: skip
    controls = [f"letters-{mixer}-no_plan" for mixer in LETTER_MIXERS] + [
        f"shakespeare-{name}" for name in CONTROLS
    ]
    assert {run.name for run in runs[30:36]} == {f"{name}-0" for name in controls}
    assert all(DecoderConfig.from_dict(run.settings["config"]).to_dict() for run in runs)
    (few,) = {run.settings["part"] for run in hybrid_runs(parts=["plan"], seeds=[5])}
    assert few == "plan"
    for wrong in ({"parts": ["x"]}, {"seeds": [-1]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hybrid_runs(**wrong)


def test_all_runs_are_committed_and_those_of_the_grid():
    done, missing = split_finished(Path(__file__).parents[2] / "docs/experiments/hybrids", hybrid_runs())
    assert len(done) == 48 and not missing


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Narrow models, few steps, and a text of a few lines."""
    (tmp_path / "text.txt").write_text("".join(f"the {n}th line of a small text\n" for n in range(200)))
    config = DataConfig(folder=str(tmp_path / "data"), sources=(str(tmp_path / "text.txt"),), vocab_size=300)
    prepared = prepare(config)
    monkeypatch.setattr(hybrids, "prepare_shakespeare", lambda folder: prepared)
    monkeypatch.setattr(hybrids, "VOCAB_SIZE", prepared.metadata.vocab_size)
    monkeypatch.setattr(hybrids, "TEXT_SETTINGS", dict.fromkeys(("plan", "equilibrium"), TINY))
    monkeypatch.setitem(PROFILES, "ci", replace(CI, steps=2, batch_size=2, warmup_steps=1))
    monkeypatch.setattr(letters, "N_SEQUENCES", 8)
    monkeypatch.setattr(letters, "N_GROUPS", 2)
    monkeypatch.setattr(letters, "GROUP_SIZE", 2)
    return tmp_path


def test_runs_leave_what_the_report_needs_and_the_same_bytes_again(small):
    names = ("letters-fem-1_4-0", "shakespeare-fem_plan-0", "shakespeare-gla_equilibrium-0")
    runs = [run for run in hybrid_runs(seeds=[0]) if run.name in names]
    compute = partial(compute_hybrid, data=small)
    assert run_queue(runs, compute, small / "one") == 3 and run_queue(runs[:1], compute, small / "two") == 1
    files, again = contents(small / "one"), contents(small / "two")
    assert again.items() <= files.items()
    letter, plan, settled = (json.loads(files[f"{name}.json"])["result"] for name in names)
    assert letter["bounds"]["n_sequences"] == 8 and letter["bounds"]["kl"] >= 0
    assert plan["kind"] == "bound" and plan["bits_per_byte"] == plan["bounds"]["mixture_weighted"]
    assert {"kl", "mutual_information"} <= plan["statistics"].keys()
    assert {estimate["n"] for estimate in plan["sharing"].values()} == {2}
    assert settled["kind"] == "exact" and settled["sharing"] is None
    assert settled["statistics"]["converged"] == 1 and settled["statistics"]["mean_steps"] > 0
    assert [point["step"] for point in settled["curve"]] == [2, 4]


def made_up(run):
    """A result as ``compute_hybrid`` gives it; FEM pays 0.1 bits less, and 0.02 more with each seed."""
    s = run.settings
    if s["part"] == "letters":
        bounds = {
            "posterior_cross_entropy": 0.3,
            "prior_cross_entropy": 0.4,
            "kl": 0.1,
            "law": 0.35,
            "n_sequences": 8,
        }
        shared = {"valid": 0.9, "spread": None if s["seed"] else 2.0, "noise_repetition": 0.25}
        return {"parameters": 1000, "bounds": bounds, "shared": shared, "independent": shared}
    bits = 2.5 + 0.01 * s["seed"] - (0.1 - 0.02 * s["seed"]) * (s["model"][:3] in ("fem", "gla"))
    estimate = {"mean": 0.02, "standard_error": 0.01, "n": 16}
    planned, settled = s["model"].endswith("_plan"), s["model"].endswith("_equilibrium")
    statistics = {"mutual_information": 0.25, "kl": 0.3} if planned else {}
    if settled:
        statistics = {
            "mean_steps": 9.0,
            "max_steps": 20.0,
            "converged": 1.0,
            "residual": 1e-5,
            "contraction_bound": 0.6,
        }
    return {
        "parameters": 10**6, "tokens": 512, "kind": "bound" if planned else "exact", "bits_per_byte": bits,
        "bounds": {"elbo": 3.0, "kl_bits_per_token": 0.5} if planned else None, "statistics": statistics,
        "sharing": dict.fromkeys(("one_plan", "a_plan_each", "gap"), estimate) if planned else None,
    }  # fmt: skip


def test_the_study_reports_means_and_differences_seed_by_seed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("helmholtz.experiments.hybrids.study.compute_hybrid", lambda run, data: made_up(run))
    monkeypatch.setattr("helmholtz.experiments.hybrids.study.prepare_shakespeare", lambda folder: None)
    folder = tmp_path / "hybrids"
    code, out, _ = call_study(capsys, "hybrids", "run", f"--output={folder}", "--seeds", 0, 1)
    assert (
        code == 0 and "0 of 32 runs are missing" in out and (folder / "hybrids.png").stat().st_size > 10_000
    )
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    (gap,) = [
        row for row in rows if (row["model"], row.get("less")) == ("gla_equilibrium", "mamba_equilibrium")
    ]
    assert gap["bits_per_byte"]["mean"] == pytest.approx(-0.09) and gap["seeds"] == [0, 1]
    letter = next(row for row in rows if row["part"] == "letters")
    assert letter["start_spread"]["n"] == 1 and letter["excess"]["mean"] == pytest.approx(0.05)
    plan = next(row for row in rows if row["model"] == "fem_plan")
    assert plan["mutual_information_bits"]["mean"] == pytest.approx(0.25 / math.log(2))
    assert "-0.0900 ± 0.0141" in out and "< 2.4" in out
    found = hybrid_section([tmp_path])
    assert len(found.tables) == 4 and not found.empty
    assert found.missing == ("letters: 12 of 18 runs", "plan: 8 of 12 runs", "equilibrium: 12 of 18 runs")
