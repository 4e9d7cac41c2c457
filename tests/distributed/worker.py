"""What torchrun starts in the tests: some runs, one after the other, in one process group."""

import json
import shutil
import sys
from pathlib import Path

from distributed_cases import distributed_run
from helmholtz.data.prepare import DataConfig
from helmholtz.training.callbacks import Callback
from helmholtz.training.distributed import on_main, process_group, world
from helmholtz.training.run import train


class Stop(Callback):
    """Ends the run after a step as if its process had died."""

    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise ConnectionError("the machine is gone")


def main(file):
    description = json.loads(Path(file).read_text())
    data = DataConfig(**description["data"])
    with process_group("cpu", 60):
        assert world().size == description["size"]
        for case in description["cases"]:
            stop, copy = case.pop("stop", None), case.pop("copy", None)
            try:
                train(distributed_run(data, **case), callbacks=[Stop(stop)] if stop else [])
                assert stop is None
            except ConnectionError:
                assert stop is not None
            if copy is not None:
                on_main(lambda case=case, copy=copy: shutil.copytree(case["output"], copy, symlinks=True))


if __name__ == "__main__":
    main(sys.argv[1])
