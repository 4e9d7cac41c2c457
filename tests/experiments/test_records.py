"""Finished runs move from files of their own into lines of one file, and none is lost, changed or found twice."""

import json
import multiprocessing

import pytest

from helmholtz._files import write_atomically
from helmholtz._locks import locked
from helmholtz.experiments import records
from helmholtz.experiments.queue import QueuedRun, finished, fold_finished, run_queue, split_finished
from helmholtz.experiments.records import fold

RUNS = [QueuedRun(f"run-lr0.{n}", {"n": n, "sizes": [1, n]}) for n in range(4)]
THIRD = "0.1 + 0.2 and ä"


def compute(run):
    return {"third": run.settings["n"] / 3, "text": THIRD, "none": None}


def files(folder):
    return sorted(path.name for kind in ("results", "timings") for path in (folder / kind).glob("*"))


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    run_queue(RUNS[:3], compute, tmp_path)
    return tmp_path


def test_a_folded_run_is_the_run_that_was_there(folder):
    before, _ = split_finished(folder, RUNS)
    write_atomically(folder / "timings" / f"{RUNS[1].name}.curve.json", '{"cpu_seconds": [0.1, 0.2]}')
    assert fold(folder) == 3 and files(folder) == []
    after, missing = split_finished(folder, RUNS)
    assert missing == RUNS[3:]
    assert [(d.run, d.result) for d in after] == [(d.run, d.result) for d in before]
    assert after[0].timing == before[0].timing and after[0].timing["commit"]
    assert after[1].timing == before[1].timing | {"curve": {"cpu_seconds": [0.1, 0.2]}}
    assert [line["name"] for line in lines(folder)] == [run.name for run in RUNS[:3]]
    assert fold(folder) == 0


def test_a_queue_goes_on_after_its_finished_runs_were_folded(folder):
    fold(folder)
    assert run_queue(RUNS, compute, folder) == 1
    assert files(folder) == [f"{RUNS[3].name}.json"] * 2
    first = (folder / "runs.jsonl").read_text()
    done, missing = fold_finished(folder, RUNS)
    assert len(done) == 4 and missing == []
    assert (folder / "runs.jsonl").read_text().startswith(first) and len(lines(folder)) == 4


@pytest.mark.parametrize("kept", range(11))
def test_a_fold_that_is_killed_loses_nothing_and_the_next_one_ends_it(folder, monkeypatch, kept):
    """After ``kept`` of the steps that change the disk: a file written, then three removed per run."""
    before, _ = split_finished(folder, RUNS)
    steps = []

    def counted(change):
        def step(*args, **options):
            if len(steps) == kept:
                raise KeyboardInterrupt
            steps.append(change)
            return change(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", counted(write_atomically))
        patch.setattr(type(folder), "unlink", counted(type(folder).unlink))
        with pytest.raises(KeyboardInterrupt):
            fold(folder)
    assert split_finished(folder, RUNS)[0] == before
    fold(folder)
    assert split_finished(folder, RUNS)[0] == before
    assert files(folder) == [] and len(lines(folder)) == 3


def fold_again_and_again(folder):
    while fold(folder) or len(lines(folder) if (folder / "runs.jsonl").exists() else ()) < 40:
        pass


def test_processes_fold_while_others_compute(tmp_path):
    runs = [QueuedRun(f"r{n}", {"n": n}) for n in range(40)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folding = [pool.apply_async(fold_again_and_again, (tmp_path,)) for _ in range(2)]
        assert pool.apply_async(run_queue, (runs, compute, tmp_path)).get(60) == 40
        for job in folding:
            job.get(60)
    done, missing = fold_finished(tmp_path, runs)
    assert missing == [] and [d.result["third"] for d in done] == [n / 3 for n in range(40)]
    assert len(lines(tmp_path)) == 40


def test_a_folder_that_another_process_folds_is_left_to_it(folder):
    with locked(folder / ".locks" / "runs.jsonl"):
        assert fold(folder) == 0
    assert not (folder / "runs.jsonl").exists()
    assert fold(folder) == 3


def test_a_run_that_is_there_twice_and_differs_is_refused_and_both_stay(folder):
    fold(folder)
    run_queue(RUNS[:1], lambda run: {"other": 1}, folder / "elsewhere")
    own = folder / "results" / f"{RUNS[0].name}.json"
    (folder / "elsewhere" / "results" / own.name).rename(own)
    for call in (lambda: finished(folder, RUNS[0]), lambda: fold(folder)):
        with pytest.raises(ValueError, match=r"results/run-lr0\.0\.json differs from .* in runs\.jsonl"):
            call()
    assert own.exists() and len(lines(folder)) == 3


def test_lines_of_other_settings_and_damaged_ones_are_refused(folder):
    fold(folder)
    with pytest.raises(
        ValueError, match=r"run-lr0\.2 is a result of other settings: settings\.n was 2, now 7"
    ):
        finished(folder, QueuedRun("run-lr0.2", {"n": 7, "sizes": [1, 2]}))
    text = (folder / "runs.jsonl").read_text()
    cut = text.splitlines()[2][:-9]
    for damaged in (
        cut,
        "[]",
        "{}",
        '{"name": "a", "settings": {}, "result": 3, "timing": {}}',
        "[" * 100_000,
    ):
        (folder / "runs.jsonl").write_text(text + damaged + "\n")
        with pytest.raises(ValueError, match=r"runs\.jsonl, line 4: damaged .* delete the line"):
            run_queue(RUNS, compute, folder)
    (folder / "runs.jsonl").write_text(text + text.splitlines()[0].replace("0.0", "0.5", 2) + "\n")
    assert len(split_finished(folder, RUNS)[0]) == 3
    (folder / "runs.jsonl").write_text(text + text.splitlines()[0].replace('"n": 0', '"n": 5') + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 4: another result of run-lr0\.0 above"):
        split_finished(folder, RUNS)


def test_a_damaged_file_stops_a_fold_before_anything_is_changed(folder):
    (folder / "results" / f"{RUNS[1].name}.json").write_text('{"settings": {')
    before = files(folder)
    with pytest.raises(ValueError, match=r"run-lr0\.1\.json: damaged result"):
        fold(folder)
    assert files(folder) == before and not (folder / "runs.jsonl").exists()
