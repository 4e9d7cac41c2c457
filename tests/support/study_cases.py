"""Studies called as from a shell, and a study that computes nothing but its seeds."""

import pytest
import torch

from helmholtz.cli.main import main
from helmholtz.experiments.base import Study, add_seeds, make_table
from helmholtz.experiments.queue import QueuedRun, run_queue


def call_study(capsys, *arguments):
    """Exit code, output and errors of ``helmholtz study ...``."""
    code = main(["study", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(folder):
    """The bytes of all results of a queue."""
    return {path.name: path.read_bytes() for path in sorted((folder / "results").iterdir())}


def check_resumption(folder, runs, compute):
    """A queue that is interrupted in its middle and begun again leaves the bytes of one that was not; returns them."""
    run_queue(runs, compute, folder / "whole")

    def interrupted(run):
        if run == runs[len(runs) // 2]:
            raise KeyboardInterrupt
        return compute(run)

    with pytest.raises(KeyboardInterrupt):
        run_queue(runs, interrupted, folder / "cut")
    assert len(contents(folder / "cut")) == len(runs) // 2
    torch.manual_seed(99)
    assert run_queue(runs, compute, folder / "cut") == len(runs) - len(runs) // 2
    assert contents(folder / "cut") == contents(folder / "whole")
    return contents(folder / "cut")


class Numbers(Study):
    name = "numbers"
    actions = {"run": "", "report": "", "list": ""}
    reported = ("run", "report")

    @classmethod
    def add_options(cls, parser, action):
        add_seeds(parser, "")

    def runs(self):
        return [QueuedRun(f"number-{seed}", {"seed": seed}) for seed in self.values["seeds"]]

    def compute(self, run, note):
        note(1, 2)
        return {"square": run.settings["seed"] ** 2}

    def report(self, done, missing, console):
        rows = [{"run": one.run.name, "square": str(one.result["square"])} for one in done]
        console.print(make_table("Squares", rows))
        self.write_summary(rows, done, missing)
