import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helmholtz.evals.compare import Row, compare, inequalities, is_bounded, leaders, model_label, same_model
from helmholtz.evals.plots import plot_loss_curves
from helmholtz.evals.runs import Run, read_run, training_data
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


def run(name, *, parameters=1000, tokens=500, data="a", **settings):
    description = {
        "architecture": "fem_lm",
        "model": {"prior": "gla"},
        "data": {"fingerprint": data},
        "train": {"seed": 0, "steps": 10, "lr": 0.1} | settings,
    }
    return Run(Path(name), description, "data", {"parameters": parameters, "tokens": tokens}, [])


def row(name, kind, bits_per_byte):
    return Row(
        name=name, model="m", seed=0, parameters=1, tokens=1, kind=kind, validation_bits_per_byte=bits_per_byte,
        validation_perplexity=1.0, bounds=None, train_tokens_per_second=1.0, decode_tokens_per_second=1.0,
        peak_memory_bytes=1, parts={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "best"),
    [
        ([("exact", 2.0), ("exact", 1.0)], {"1"}),
        ([("exact", 2.0), ("bound", 1.9), ("exact", 2.1)], {"1"}),
        (
            [("exact", 2.0), ("bound", 2.1)],
            {"0"},
        ),  # the bound decides nothing: the lowest exact number is marked
        ([("exact", 2.0), ("bound", 2.0)], {"0"}),
        (
            [("bound", 1.8), ("exact", 2.0), ("bound", 1.9)],
            {"0", "2"},
        ),  # both win; which is better is unknown
        ([("bound", 1.8), ("bound", 1.9)], set()),
    ],
)
def test_a_bound_is_marked_only_where_it_is_below_every_exact_number(numbers, best):
    assert leaders([row(str(index), *number) for index, number in enumerate(numbers)]) == best


def objective(name, kappa_bits):
    free = run(name)
    free.description["objective"] = {"kappa_bits": kappa_bits} if kappa_bits else None
    return free


def test_an_objective_is_no_budget_but_tells_models_apart():
    plain, half, one = objective("a", None), objective("b", 0.5), objective("c", 1.0)
    assert inequalities([run("d"), plain, half, one]) == []
    assert len({same_model(r) for r in (plain, half, one)}) == 3
    assert same_model(plain) == same_model(run("d"))
    assert model_label(
        {"architecture": "free_transformer", "model": {}, "objective": {"kappa_bits": 0.125}}
    ) == ("free_transformer (0.125 bits)")


def test_equal_budgets_pass_whatever_the_seed():
    assert inequalities([run("a"), run("b", seed=1), run("c", parameters=1020)]) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run("b", parameters=1021), "parameters differ by more than 2%: a 1,000, b 1,021"),
        (run("b", tokens=501), "b has seen 501 tokens, a 500"),
        (run("b", data="b"), "b and a were trained on different data"),
        (run("b", lr=0.2), "train.lr is 0.2 in b and 0.1 in a"),
        (run("b", warmup_steps=3), "train.warmup_steps is 3 in b and None in a"),
    ],
)
def test_unequal_budgets_are_named(other, message):
    assert inequalities([run("a"), other]) == [message]


def test_models_are_labelled_by_their_priors():
    assert model_label({"architecture": "transformer", "model": {}}) == "transformer"
    assert model_label({"architecture": "fem_lm", "model": {"prior": "gla"}}) == "fem_lm (gla)"
    hybrid = {"architecture": "fem_lm", "model": {"prior": ["gla", "softmax", "gla"]}}
    assert model_label(hybrid) == "fem_lm (gla, softmax)"


def test_only_a_plan_makes_a_loss_a_bound():
    assert is_bounded({"architecture": "free_transformer", "objective": {"kappa_bits": 0.5}})
    assert not is_bounded({"architecture": "mamba_hopfield", "objective": {"energy_weight": 0.1}})
    assert not is_bounded({"architecture": "transformer", "objective": None})


def test_seeds_are_summarised(tmp_path):
    data = prepare_text(tmp_path)
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        train(tiny_run(data, folder, seed=seed, steps=5))
    comparison = compare(folders)
    assert [row.seed for row in comparison.rows] == [0, 1, 2]
    values = [row.validation_bits_per_byte for row in comparison.rows]
    assert len(set(values)) == 3
    (group,) = comparison.groups
    mean = sum(values) / 3
    assert group.mean_bits_per_byte == pytest.approx(mean)
    assert group.deviation == pytest.approx((sum((value - mean) ** 2 for value in values) / 2) ** 0.5)
    assert all(row.peak_memory_bytes > 1e8 and row.decode_tokens_per_second > 1 for row in comparison.rows)


def test_the_speed_of_a_run_without_logged_steps_is_its_mean():
    plain = run("a")
    assert replace(plain, metrics=[], summary={"tokens": 100, "seconds": 4.0}).train_tokens_per_second() == 25
    steps = [{"kind": "step", "tokens": 1, "tokens_per_second": speed} for speed in (1.0, 7.0, 9.0)]
    assert replace(plain, metrics=steps).train_tokens_per_second() == 7


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run here"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="has not ended yet"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "interrupted", "steps": 7}')
    with pytest.raises(ValueError, match="is interrupted at step 7, not finished"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="at least one folder"):
        compare([])


FINISHED = {
    "status": "finished", "steps": 2, "tokens": 64, "seconds": 1.5, "parameters": 9, "peak_memory_bytes": 7,
    "commit": "a",
}  # fmt: skip
DESCRIPTION = {
    "architecture": "fem_lm",
    "model": {},
    "data": {"fingerprint": "f"},
    "train": {"seq_len": 8, "batch_size": 2, "seed": 0},
    "objective": {"kappa_bits": 0.5},
}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "[]", "wanted an object, got \\[\\]"),
        ("summary.json", FINISHED | {"status": None}, "status must be str, got None"),
        ("summary.json", FINISHED | {"parameters": True}, "parameters must be int, got True"),
        ("summary.json", FINISHED | {"seconds": "1"}, "seconds must be int or float, got '1'"),
        ("summary.json", {"status": "finished", "steps": 2}, "tokens must be int, got 'nothing'"),
        ("metrics.jsonl", '{"kind": "step", "tokens": 1}\n{"kind"', "Expecting"),
        ("metrics.jsonl", {"tokens": 1}, "kind must be str"),
        ("metrics.jsonl", {"kind": "step", "step": 1, "tokens": 1}, "it ends at step 1 of 2"),
        ("metrics.jsonl", "", "it ends at step 0 of 2"),
        ("run.json", "[" * 100_000, "too deeply nested"),
        ("summary.json", '{"steps": 1' + "0" * 30 + "}", "an integer of 31 digits"),
        ("run.json", {"identity": DESCRIPTION}, "data_folder must be str"),
        (
            "run.json",
            {"identity": DESCRIPTION | {"model": 1}, "data_folder": "d"},
            "model must be dict, got 1",
        ),
        ("run.json", {"identity": DESCRIPTION | {"data": {}}, "data_folder": "d"}, "fingerprint must be str"),
        ("run.json", {"identity": DESCRIPTION | {"train": {}}, "data_folder": "d"}, "seq_len must be int"),
        (
            "run.json",
            {"identity": DESCRIPTION | {"objective": {"kappa_bits": "x"}}, "data_folder": "d"},
            "kappa_bits",
        ),
    ],
)
def test_a_file_that_says_something_else_is_named(tmp_path, file, content, message):
    good = {
        "run.json": {"identity": DESCRIPTION, "data_folder": "d"},
        "summary.json": FINISHED,
        "metrics.jsonl": {"kind": "step", "step": 2, "tokens": 1},
    }
    for name, value in good.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert read_run(tmp_path).series("eval", "x") == ([], [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: speed must be int or float"):
        read_run(tmp_path).series("step", "speed")
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"{file} is damaged: .*{message}"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data_folder": 1}', "[" * 100_000, '"\udcff'])
def test_a_damaged_description_is_named_where_the_data_are_looked_up(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        training_data(tmp_path)


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"helmholtz-nn\[plot\]"):
        plot_loss_curves([], tmp_path / "loss.png")
