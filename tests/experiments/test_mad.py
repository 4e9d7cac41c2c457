"""The MAD study: its models, its protocol, its queue."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helmholtz.experiments.mad import run as mad_run
from helmholtz.experiments.mad.data import IGNORED, TASKS, draw
from helmholtz.experiments.mad.models import MODELS, MadSizes, build_model, mad_d_ff
from helmholtz.experiments.mad.report import PUBLISHED, SHORT, Row, comparisons, rows_of
from helmholtz.experiments.mad.run import PROFILES, MadRun, chosen_rates
from helmholtz.experiments.mad.training import MadProtocol, macro_accuracy, measure, train
from helmholtz.experiments.queue import FinishedRun, QueuedRun, run_queue, spread
from helmholtz.layers.sizing import count_parameters
from mad_cases import RECALL, SIZES, SQUEEZE, profile, protocol
from study_cases import contents

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", MODELS)
def test_no_row_looks_into_the_future(name):
    model = build_model(name, RECALL.task, SIZES, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(8, (2, 11))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 8
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    # to rounding: tokens that have converged leave the solver, and the others stand elsewhere in its products
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-9, atol=1e-9)
    assert (before[:, 6:] - after[:, 6:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("task", ["in-context-recall", "compression"])
def test_all_rows_have_the_parameters_of_attention(task):
    sizes = MadSizes()
    wanted = count_parameters(build_model("attention", TASKS[task], sizes, seed=0))
    for name in MODELS:
        model = build_model(name, TASKS[task], sizes, seed=0)
        assert abs(count_parameters(model) - wanted) < 0.005 * wanted, name
        assert model.blocks[0].mlp.down_proj.in_features == mad_d_ff(name, TASKS[task], sizes)
    assert mad_d_ff("attention", TASKS[task], sizes) == 352
    with pytest.raises(ValueError, match="sizes.d_ff: .* parameters cannot be matched"):
        build_model("mamba_hopfield", TASKS[task], replace(sizes, d_ff=32), seed=0)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fem_softmax", "CLTG"),
        ("fem_softmax_clt", "CLT"),
        ("fem_softmax_cl", "CL"),
        ("fem_softmax_c", "C"),
        ("fem_softmax_mean", ""),
    ],
)
def test_the_ablation_switches_off_one_part_after_the_other(name, parts):
    mixer = build_model(name, RECALL.task, SIZES, seed=0).blocks[0].mixer
    found = {
        "C": mixer.tdc is not None,
        "L": mixer.config.read != "mean",
        "T": "inner" in mixer.query_widths and hasattr(mixer, "theta"),
        "G": "outer" in mixer.query_widths,
    }
    assert "".join(part for part, there in found.items() if there) == parts


def test_the_published_heads():
    heads = {name: getattr(build_model(name, RECALL.task, MadSizes(), seed=0).blocks[1].mixer, "config", None)
             for name in ("fem_softmax", "fem_gla", "fem_linear")}  # fmt: skip
    assert {
        name: (c.prior, c.n_heads, c.n_heads * c.d_head, c.n_heads * c.d_head_v) for name, c in heads.items()
    } == {
        "fem_softmax": ("softmax", 16, 128, 64),
        "fem_gla": ("gla", 8, 128, 64),
        "fem_linear": ("linear", 8, 128, 64),
    }


def test_the_seed_draws_the_weights_and_nothing_else_changes():
    state = torch.get_rng_state()
    one, same, other = (build_model("fem_softmax", SQUEEZE.task, SIZES, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def plain_macro(wanted, answered):
    shares = []
    for c in set(wanted) | set(answered):
        asked = [a == c for w, a in zip(wanted, answered, strict=True) if w == c]
        shares.append(sum(asked) / len(asked) if asked else 0.0)
    return sum(shares) / len(shares)


def test_macro_accuracy_is_that_of_a_loop():
    for n in (1, 3, 40):
        wanted, answered = torch.randint(2, 7, (n,)), torch.randint(2, 9, (n,))
        expected = plain_macro(wanted.tolist(), answered.tolist())
        assert macro_accuracy(wanted, answered, 12) == pytest.approx(expected, abs=1e-12)
    assert macro_accuracy(torch.tensor([1, 1, 1, 2]), torch.tensor([1, 1, 1, 3]), 5) == pytest.approx(1 / 3)


def test_scores_are_per_batch_pooled_and_plain():
    model, (_, test) = build_model("attention", RECALL.task, SIZES, seed=3), draw(RECALL, seed=0)
    scores = measure(model, test, batch_size=16)
    logits, places = model(test.inputs).logits.detach(), test.targets != IGNORED
    wanted, answered = test.targets, logits.argmax(-1)
    macros = [plain_macro(wanted[rows][places[rows]].tolist(), answered[rows][places[rows]].tolist())
              for rows in (slice(0, 16), slice(16, 24))]  # fmt: skip
    assert scores.batch_macro == pytest.approx(sum(macros) / 2, abs=1e-12)
    every = wanted[places].tolist(), answered[places].tolist()
    assert scores.pooled_macro == pytest.approx(plain_macro(*every), abs=1e-12)
    assert scores.micro == pytest.approx(sum(a == b for a, b in zip(*every, strict=True)) / len(every[0]))
    nats = torch.nn.functional.cross_entropy(logits[places], wanted[places])
    assert scores.loss == pytest.approx(nats.item(), rel=1e-5)
    assert len({scores.batch_macro, scores.pooled_macro, scores.micro}) == 3


def trained(rules, *, lr=1e-2, setting=SQUEEZE, **changes):
    model = build_model("attention", setting.task, SIZES, seed=0)
    settings = {"lr": lr, "weight_decay": 0.1, "seed": 0} | changes
    return train(model, draw(setting, seed=0), rules, **settings), model


def test_training_follows_the_curve_to_its_end():
    rules = protocol(steps=7)
    steps = []
    found, model = trained(rules, callback=steps.append)
    assert steps == list(range(1, 8)) and found.stopped == "end" and found.steps == 7
    assert [point["step"] for point in found.curve] == [3, 5, 7]
    assert found.curve[-1]["loss"] < found.curve[0]["loss"] and model.training
    last = measure(model, draw(SQUEEZE, seed=0)[1], batch_size=16)
    assert found.curve[-1]["loss"] == last.loss and found.curve[-1]["batch_macro"] == last.batch_macro
    again, _ = trained(rules)
    assert again == found
    assert trained(rules, seed=1)[0] != found, "another order of the sequences"
    assert trained(rules, weight_decay=0.5)[0] != found


def test_training_stops_at_the_accuracy():
    found, _ = trained(protocol(stop_at=0.0))
    assert (found.stopped, found.steps, len(found.curve)) == ("accuracy", 2, 1)
    assert trained(protocol(stop_at=None))[0].stopped == "end"


def test_schedules():
    constant, cosine = protocol(), protocol(schedule="cosine")
    assert [constant.lr_at(t, 10, 1e-3) for t in (0, 9)] == [1e-3, 1e-3]
    rates = [cosine.lr_at(t, 10, 1e-3) for t in range(11)]
    assert (
        rates[0] == 1e-3 and rates[5] == pytest.approx((1e-3 + 1e-6) / 2) and rates[10] == pytest.approx(1e-6)
    )
    assert trained(cosine)[0] != trained(constant)[0]


def test_which_evaluation_counts():
    found, _ = trained(protocol())
    losses = zip(found.curve, (2.0, 1.0, 3.0), strict=True)
    curve = [point | {"loss": loss, "micro": i / 10} for i, (point, loss) in enumerate(losses)]
    found = replace(found, curve=curve)
    for select, accuracy, expected in (("last", "micro", 0.2), ("best_test_perplexity", "micro", 0.1)):
        rules = protocol(select=select, accuracy=accuracy)
        result = found.to_dict(rules)
        assert result["score"] == expected
        assert result["best"] == curve[2] and result["final"] == curve[2] and result["curve"] == curve
    assert found.to_dict(protocol())["score"] == curve[-1]["batch_macro"]


def test_a_run_that_diverges_says_so():
    found, _ = trained(protocol(), lr=1e30)
    assert found.to_dict(protocol()) == {
        "score": None, "stopped": "diverged", "steps": 2, "final": None, "best": None, "curve": []
    }  # fmt: skip


def test_steps_of_epochs():
    paper = PROFILES["paper"].protocol
    assert (paper.n_steps(12_800), paper.n_steps(256), paper.n_steps(800)) == (20_000, 400, 1_400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps must be None if epochs are given"),
        ({"epochs": 2}, "steps must be None if epochs are given"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"stop_at": 1.5}, "stop_at must be in"),
        ({"n_evaluations": 0}, "n_evaluations must be an integer"),
    ],
)
def test_bad_protocols(changes, message):
    with pytest.raises(ValueError, match=message):
        MadProtocol(**({"batch_size": 4, "steps": 5, "n_evaluations": 1} | changes))


def test_a_result_is_a_function_of_the_settings():
    run = MadRun(RECALL, "fem_gla", 1e-3, 0.1, 0, protocol(), SIZES)
    result = run.compute()
    assert json.dumps(run.compute()) == json.dumps(result)
    assert json.dumps(replace(run, seed=1).compute()) != json.dumps(result)
    assert result["parameters"] > result["mixer_parameters"] > 0 and result["d_ff"] % 4 == 0
    settings = run.queued().settings
    assert settings["protocol"]["schedule"] == "constant" and settings["task_sizes"] == {
        "vocab_size": 8,
        "seq_len": 12,
    }
    names = {
        run.name,
        replace(run, lr=1e-4).name,
        replace(run, seed=2).name,
        replace(run, model="mamba").name,
        replace(run, initialization="normal_0.02").name,
    }
    assert len(names) == 5


def test_a_partial_queue_has_whole_tasks_on_the_first_seed():
    runs = profile().runs(["in-context-recall", "compression"], ("attention", "mamba"), (0, 1))
    assert [(r.seed, r.setting.task_name, r.model) for r in runs] == [
        (seed, task, model)
        for seed in (0, 1)
        for task in ("compression", "in-context-recall")
        for model in ("attention", "mamba")
    ]
    with pytest.raises(ValueError, match="models must be one of .* did you mean 'mamba'"):
        profile().runs(["compression"], ("mambo",), (0,))
    with pytest.raises(ValueError, match="tasks must be one of"):
        profile().runs(["copying"], ("mamba",), (0,))


def test_the_profiles():
    paper, quick, pilot = (PROFILES[name] for name in ("paper", "quick", "pilot"))
    runs = paper.runs(list(TASKS), ["attention"], [0])
    assert len(runs) == len({run.name for run in runs}) == 66 * 6
    assert paper.models == tuple(MODELS) and paper.protocol.batch_size == 128
    assert not set(quick.seeds) & set(pilot.seeds), "the pilot sees none of the measured data"
    tuned = ("attention", "fem_softmax", "fem_gla", "mamba")
    assert pilot.models == tuned and len(pilot.runs(list(TASKS), tuned, pilot.seeds)) == 18 * 4
    assert set(quick.models) == {*tuned, *mad_run.ABLATION}
    assert (quick.protocol.batch_size, quick.protocol.steps, quick.weight_decays) == (32, 3000, (0.1,))
    assert all(settings[0].name == "baseline" and len(settings) == 1 for settings in quick.settings.values())


def test_the_grid_of_starts_has_fuzzy_recall_and_the_new_start_first():
    start = PROFILES["start"]
    runs = start.runs(list(start.settings), start.models, start.seeds)
    assert start.protocol == PROFILES["quick"].protocol
    assert [(r.setting.task_name, r.seed, r.initialization, r.lr, r.model) for r in runs] == [
        (task, seed, initialization, lr, model)
        for task in ("fuzzy-in-context-recall", "selective-copying")
        for seed in (0, 1)
        for initialization in ("fan_in", "normal_0.02")
        for lr in (1e-3, 5e-4)
        for model in ("attention", "fem_softmax", "fem_gla")
    ]
    assert len({run.name for run in runs}) == 48


def test_kept_results_of_the_former_start_are_no_results_of_today():
    folder = ROOT / "docs" / "experiments" / "mad" / "quick_normal_0.02"
    kept = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(kept) == 64 and all("initialization" not in run["settings"] for run in kept)
    names = {run["name"] for run in kept}
    for initialization in ("fan_in", "normal_0.02"):
        same = replace(PROFILES["quick"], lrs=(1e-3,), initializations=(initialization,))
        assert not names & {run.name for run in same.runs(list(TASKS), same.models, same.seeds)}


def test_quick_takes_the_learning_rates_that_the_pilot_chose(monkeypatch):
    file = ROOT / "docs" / "experiments" / "mad" / "learning_rates.json"
    committed = json.loads(file.read_text())["learning_rates"] if file.exists() else {}
    assert committed == mad_run.LEARNING_RATES
    rates = {"compression": {"attention": 5e-4, "fem_softmax": 1e-3}}
    monkeypatch.setattr(mad_run, "LEARNING_RATES", rates)
    quick = PROFILES["quick"]
    runs = quick.runs(["compression"], ["attention", "fem_softmax", "fem_softmax_c"], [0])
    assert [run.lr for run in runs] == [5e-4, 1e-3, 1e-3], "the ablation has the rate of what it takes apart"
    wanted = (
        r"tasks must be a task and model that a pilot has .* \(compression: attention fem_softmax\), got "
    )
    with pytest.raises(ValueError, match=wanted + "'memorization with attention'"):
        quick.runs(list(TASKS), ["attention"], [0])
    with pytest.raises(ValueError, match=wanted + "'compression with mamba'"):
        quick.runs(["compression"], ["mamba"], [0])


def test_the_rate_with_the_lowest_loss_is_chosen_for_each_model():
    def done(task, lr, score, loss, model="attention"):
        final = None if loss is None else {"loss": loss}
        settings = {"task": task, "model": model, "lr": lr}
        return FinishedRun(QueuedRun(f"{task}-{model}-{lr}", settings), {"score": score, "final": final}, {})

    runs = [done("a", 1, 0.5, 2.5), done("a", 2, 0.7, 3.0), done("a", 3, 0.6, 2.0)]
    runs += [done("a", 1, 0.5, 1.5, "mamba"), done("a", 3, 0.5, 1.7, "mamba")]
    runs += [done("b", 1, None, None), done("b", 2, 0.1, 9.0)]
    assert chosen_rates(runs) == {"a": {"attention": 3, "mamba": 1}, "b": {"attention": 2}}
    with pytest.raises(ValueError, match="a pair with a run that did not diverge, got 'b with attention'"):
        chosen_rates(runs[5:6])


def test_a_third_seed_is_reported_where_it_is():
    tiny = profile(settings={"in-context-recall": (RECALL,)}, extra_seeds=(2,))
    runs = tiny.runs(["in-context-recall"], ["attention", "fem_softmax"], [0, 1, 2])
    scores = zip(runs[:-1], (0.1, 0.2, 0.3, 0.4, 0.8), strict=True)
    done = [FinishedRun(run.queued(), {"score": score, "parameters": 5}, {}) for run, score in scores]
    cells = [row.tasks["in-context-recall"] for row in rows_of(tiny, done)]
    assert [(cell.n, round(cell.mean, 3)) for cell in cells] == [(3, 0.4), (2, 0.3)]


def test_a_task_scores_the_mean_of_its_settings_and_the_best_of_their_grids():
    harder = replace(RECALL, name="vocab_size=8")
    tiny = profile(settings={"in-context-recall": (RECALL, harder)}, lrs=(1e-4, 1e-3), seeds=(0,))
    runs = tiny.runs(["in-context-recall"], ["attention"], [0])
    results = zip(runs, (0.6, 0.2, None, 0.4), strict=True)
    done = [FinishedRun(run.queued(), {"score": score, "parameters": 5}, {}) for run, score in results]
    (row,) = rows_of(tiny, done)
    assert row.tasks["in-context-recall"].mean == pytest.approx(0.5) and row.parameters == 5
    assert rows_of(tiny, done[:3])[0].tasks["in-context-recall"] is None, "a run is missing"
    diverged = [*done[:3], replace(done[3], result=done[2].result)]
    assert rows_of(tiny, diverged)[0].tasks["in-context-recall"] is None, "a setting has no score"
    assert rows_of(tiny, []) == []


def test_comparisons_with_the_published_differences():
    def row(model, **tasks):
        spreads = {task: spread(values) for task, values in tasks.items()}
        return Row(model, 1, spreads, spread([0.5, 0.6]))

    fuzzy, noisy = "fuzzy-in-context-recall", "noisy-in-context-recall"
    rows = [
        row(
            "attention",
            **{"compression": [0.40, 0.42], fuzzy: [0.2, 0.3], "memorization": [0.5, 0.5], noisy: [1.0, 1.0]},
        ),
        row("fem_softmax", **{"compression": [0.50, 0.52], fuzzy: [0.2, 0.3], "memorization": [0.4, 0.4]}),
        row("fem_gla", **{"compression": [0.1], fuzzy: [0.1, 0.1], noisy: [0.999, 0.999]}),
    ]
    found = {(c["task"], c["first"], c["second"]): c for c in comparisons(rows, stop_at=0.999)}
    pair = ("attention", "fem_softmax")
    assert found["compression", *pair] | {"deviations": 0} == {
        "task": "compression",
        "first": "attention",
        "second": "fem_softmax",
        "published": 8.8,
        "ours": 10.0,
        "deviations": 0,
        "verdict": "agrees",
    }
    assert found["compression", *pair]["deviations"] == pytest.approx(200 * 0.02 / 2**0.5, abs=0.01)
    assert found[fuzzy, *pair]["verdict"] == "unclear"
    assert found["memorization", *pair]["verdict"] == "differs"
    assert found["compression", "attention", "fem_gla"]["verdict"] == "one run"
    assert found[fuzzy, "attention", "fem_gla"]["verdict"] == "agrees"
    assert found[noisy, "attention", "fem_gla"]["verdict"] == "both solve it"
    never = comparisons(rows, stop_at=None)
    assert [c["verdict"] for c in never if c["task"] == noisy] == ["agrees"]
    assert ("memorization", "attention", "fem_gla") not in found
    assert not any(c["task"] == "average" for c in found.values()), (
        "no two neighbours of the ablation are there"
    )


def test_published_rows_have_their_averages():
    for row in PUBLISHED:
        mean = sum(row.tasks) / 6
        assert abs(mean - row.average) < 0.3, row
    assert {row.model for row in PUBLISHED} - {None} <= set(MODELS) and set(SHORT) == set(TASKS)


def compute_all(folder, stuck=None):
    """The tiny queue; the run of number ``stuck`` says so after three steps and waits for ever."""
    runs = profile().runs(["compression", "in-context-recall"], ("attention", "fem_softmax"), (0,))
    by_name = {run.name: run for run in runs}

    def wait(step):
        if step == 3:
            (folder / "stuck").touch()
            time.sleep(3600)

    def compute(queued):
        run = by_name[queued.name]
        return run.compute(wait) if runs.index(run) == stuck else run.compute()

    run_queue([run.queued() for run in runs], compute, folder)


def test_a_queue_that_was_killed_leaves_the_bytes_of_one_that_was_not(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = multiprocessing.get_context("fork").Process(target=compute_all, args=(cut, 2))
    process.start()
    while not (cut / "stuck").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(contents(cut)) == 2
    compute_all(cut)
    compute_all(whole)
    assert contents(cut) == contents(whole) and len(contents(whole)) == 4
