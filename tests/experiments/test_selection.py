"""The study of channel-wise selection: what its numbers mean, on sizes that take no time."""

import json
import math

import pytest
import torch

from helmholtz.experiments.queue import run_queue
from helmholtz.experiments.selection.data import SelectionTask, sample_caches
from helmholtz.experiments.selection.run import (
    MAXIMUM_READERS,
    Reader,
    SelectionStudy,
    build_reader,
    channel_influence,
    compute,
    count_patterns,
    learn,
    measure_gaps,
    measure_reader,
    queue,
    read_channels,
)

TASK = SelectionTask(target="maximum", n_tokens=6, n_channels=4)


@pytest.fixture(scope="module")
def rows():
    return measure_gaps(16, 4_000, [1.0, 5.0, 50.0], [40.0, 80.0], seed=0)


def test_measured_gaps_are_those_of_the_law(rows):
    assert [row["read"] for row in rows] == ["mean"] + ["exact", "op", "op"] * 3
    for row in rows:
        assert abs(row["gap"] - row["law"]) < 4 * row["standard_error"]


def test_no_unclipped_gap_leaves_its_bound_and_the_clipped_one_does(rows):
    assert all(row["outside_bound"] == 0 for row in rows if row["read"] == "exact")
    clipped = next(row for row in rows if row["beta"] == 50.0 and row["cap"] == 40.0)
    assert clipped["outside_bound"] > 2_000
    assert clipped["gap"] > 5 * next(r for r in rows if r["beta"] == 50.0 and r["cap"] is None)["gap"]


def test_the_op_and_the_exact_read_agree_where_nothing_is_clipped(rows):
    at_five = [row for row in rows if row["beta"] == 5.0]
    assert at_five[1]["gap"] == pytest.approx(at_five[0]["gap"], abs=1e-6)


def test_what_an_affine_function_of_the_read_leaves_falls_with_beta(rows):
    left = [row["residual"] for row in rows if row["cap"] is None]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("label", MAXIMUM_READERS)
def test_all_layers_have_the_parameters_of_attention(label):
    layer = build_reader(MAXIMUM_READERS[label], 16)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16**2


def test_fixed_values_start_at_the_reads_of_the_cache_and_do_not_move():
    drawn = sample_caches(TASK, 3, generator=torch.Generator().manual_seed(0))
    for reader, wanted in (
        (Reader("mean", 1.0, 2), drawn.cache.mean(1)),
        (Reader("free_energy", 5.0, 2), ((5 * drawn.cache).logsumexp(1) - math.log(6)) / 5),
    ):
        layer = build_reader(reader, TASK.width)
        layer.in_proj.weight.data[: -TASK.width] = 0  # scores 0: the uniform prior
        torch.testing.assert_close(read_channels(layer, drawn.query, drawn.cache, TASK), wanted)
        read_channels(layer, drawn.query, drawn.cache, TASK).sum().backward()
        assert (layer.in_proj.weight.grad[-TASK.width :] == 0).all()
        assert layer.o_proj.weight.grad.abs().sum() > 0


def test_influence_finds_the_largest_value_of_a_sharp_read_and_shares_alike_in_a_mean():
    drawn = sample_caches(TASK, 20, generator=torch.Generator().manual_seed(0))
    sharp, flat = (
        build_reader(Reader(read, beta, 2), TASK.width)
        for read, beta in (("free_energy", 15.0), ("mean", 1.0))
    )
    for layer in (sharp, flat):
        layer.in_proj.weight.data[: -TASK.width] = 0
    found = channel_influence(sharp, drawn.query, drawn.cache, TASK)
    assert torch.equal(found.argmax(1), drawn.token)
    torch.testing.assert_close(found.sum(1), torch.ones(20, 4))
    found = channel_influence(flat, drawn.query, drawn.cache, TASK)
    torch.testing.assert_close(found, torch.full_like(found, 1 / 6))
    assert measure_reader(sharp, TASK, seed=0)["selected"] > 0.99


def test_a_step_of_learning_is_made_of_the_settings_alone():
    def settings(seed=0, steps=30):
        return {
            "task": {"target": "maximum", "n_tokens": 6, "n_channels": 4},
            "reader": {"read": "free_energy", "beta": 5.0, "n_heads": 2, "fixed": True},
            "steps": steps, "batch_size": 16, "lr": 1e-2, "seed": seed,
        }  # fmt: skip

    first = learn(settings())
    torch.manual_seed(99)
    assert learn(settings()) == first
    assert learn(settings(seed=1)) != first
    assert first["rms_error"] < 0.8 * learn(settings(steps=2))["rms_error"]
    assert 0 < first["explained"] < 1
    assert first["explained"] == pytest.approx(
        1 - (first["rms_error"] / 0.643) ** 2, abs=0.08
    )  # sd of the max of 6


def test_channels_reach_every_pattern_and_heads_only_their_own():
    found = count_patterns(3, 1, 4, n_draws=4_000, beta=5.0, seed=0)
    assert found["attention"] <= found["by_heads"] == 3
    assert found["free_energy"] == found["by_channels"] == 81
    found = count_patterns(2, 2, 4, n_draws=500, beta=5.0, seed=0)
    assert (found["attention"], found["by_heads"]) == (4, 4)


def test_the_queue_names_every_run_and_computes_each_part(tmp_path):
    study = SelectionStudy(
        steps=2, batch_size=4, maximum=TASK, named=SelectionTask(target="named", n_tokens=3, n_channels=8)
    )
    runs = queue(study, [0, 1])
    assert len(runs) == 2 * (1 + 8 + 6 + 1)
    assert runs[0].name == "gaps-0" and runs[16].name == "gaps-1"
    picked = [
        run
        for run in runs
        if run.name in ("maximum-attention_values_learned-0", "named-free_energy_2_heads-1")
    ]
    assert run_queue(picked, compute, tmp_path) == 2
    content = json.loads((tmp_path / "results" / f"{picked[0].name}.json").read_text())
    assert content["settings"]["reader"] == {"read": "mean", "beta": 1.0, "n_heads": 4, "fixed": False}
    assert len(content["result"]["example"]["influence"]) == 4
    with pytest.raises(ValueError, match="seeds"):
        queue(study, [-1])
