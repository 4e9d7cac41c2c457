"""A queue computes each run once, leaves the same bytes however it was interrupted, and refuses what is not its own."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from helmholtz.experiments.queue import QueuedRun, finished, run_queue, shard, split_finished, spread
from study_cases import check_resumption, contents

RUNS = [QueuedRun(f"task-{n}", {"n": n, "sizes": [1, n]}) for n in range(5)]


def square(run):
    return {"square": run.settings["n"] ** 2}


def test_every_run_is_computed_once_and_found_again(tmp_path):
    events = []
    assert (
        run_queue(RUNS[:2], square, tmp_path, report=lambda run, event: events.append((run.name, event))) == 2
    )
    done, missing = split_finished(tmp_path, RUNS)
    assert [d.result["square"] for d in done] == [0, 1]
    assert missing == RUNS[2:]
    assert run_queue(RUNS, square, tmp_path, report=lambda run, event: events.append((run.name, event))) == 3
    assert [event for name, event in events if name == "task-1"] == ["begins", "done in 0 s", "done before"]
    timing = finished(tmp_path, RUNS[0]).timing
    assert timing["seconds"] >= 0 and timing["cpu_seconds"] >= 0
    assert {"date", "commit", "hardware"} < timing.keys()


def test_an_interrupted_queue_leaves_the_bytes_of_one_that_was_not(tmp_path):
    assert len(check_resumption(tmp_path, RUNS, square)) == 5


def slow_square(run):
    time.sleep(0.05)
    return square(run)


def test_two_processes_share_a_folder_without_computing_anything_twice(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [pool.apply_async(run_queue, (RUNS, slow_square, tmp_path)) for _ in range(2)]
        counts = [job.get() for job in jobs]
    assert sum(counts) == len(RUNS)
    assert len(contents(tmp_path)) == len(RUNS)


def test_shards_part_the_runs_evenly_and_refuse_other_texts():
    parts = [shard(RUNS, f"{i}/3") for i in range(3)]
    assert sorted(run.name for part in parts for run in part) == [run.name for run in RUNS]
    assert [len(part) for part in parts] == [2, 2, 1]
    for text in ("3/3", "0/0", "-1/2", "1", "a/b"):
        with pytest.raises(ValueError, match="shard"):
            shard(RUNS, text)


def test_files_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    run_queue(RUNS, square, tmp_path)
    with pytest.raises(ValueError, match=r"settings\.n was 2, now 7"):
        finished(tmp_path, QueuedRun("task-2", {"n": 7, "sizes": [1, 2]}))
    Path(tmp_path / "results" / "task-1.json").write_text('{"settings": {"n"')
    with pytest.raises(ValueError, match=r"task-1\.json: damaged result .* delete it"):
        run_queue(RUNS, square, tmp_path)


def test_a_result_that_is_not_finite_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="task-0: its result is not finite JSON"):
        run_queue(RUNS, lambda run: {"loss": float("nan")}, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_bad_names_settings_and_repeated_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name"):
        QueuedRun("../elsewhere", {})
    with pytest.raises(ValueError, match="settings"):
        QueuedRun("a", {"sizes": (1, 2)})
    with pytest.raises(ValueError, match="runs must be names that differ, got"):
        run_queue([RUNS[0], RUNS[0]], square, tmp_path)


def test_a_lost_timing_does_not_lose_the_result(tmp_path):
    run_queue(RUNS[:1], square, tmp_path)
    (tmp_path / "timings" / "task-0.json").unlink()
    assert finished(tmp_path, RUNS[0]).timing == {}
    assert json.loads((tmp_path / "results" / "task-0.json").read_text())["result"] == {"square": 0}


def test_spread_is_mean_range_and_sample_deviation():
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.low, found.high, found.n) == (3.0, 1.0, 6.0, 3)
    assert found.deviation == pytest.approx(7**0.5)
    assert spread([4.0]).deviation is None
    with pytest.raises(ValueError, match="number of values"):
        spread([])


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"seconds": 1' + "0" * 30 + "}"])
def test_a_damaged_timing_is_named(tmp_path, content):
    run_queue(RUNS[:1], square, tmp_path)
    file = tmp_path / "timings" / "task-0.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"timings/task-0.json: damaged .*delete it"):
        finished(tmp_path, RUNS[0])
    file.unlink()
    assert finished(tmp_path, RUNS[0]).timing == {}
