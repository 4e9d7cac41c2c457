"""What torchrun starts in ``test_faults.py``: sharded runs that end because one of two processes has numbers that are
not finite, in a way for every place where they are searched for.

    torchrun --nproc-per-node=2 tests/distributed/poisoned.py DATA_FOLDER OUTPUT
"""

import gc
import math
import sys
from pathlib import Path

import torch

from distributed_cases import distributed_run
from helmholtz.data.prepare import DataConfig
from helmholtz.models.transformer import Transformer
from helmholtz.training.callbacks import Callback
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.distributed import gather_text, process_group, world
from helmholtz.training.run import train

PLACES = ("parameter", "output", "gradient", "evaluation")


class Poison(Callback):
    """Spoils the model of rank 1 after the second step, in a place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def on_step(self, record) -> None:
        if record.step != 2 or record.skipped or world().rank != 1:
            return
        models = [thing for thing in gc.get_objects() if isinstance(thing, Transformer)]
        (model,) = (thing for thing in models if not hasattr(thing, "spoilt"))
        model.spoilt = True
        if self.place == "parameter":
            with torch.no_grad():
                model.blocks[0].mlp.down_proj.weight.to_local()[0, 0] = math.nan
        elif self.place == "output":
            model.blocks[1].register_forward_hook(lambda module, inputs, output: output * math.nan)
        elif self.place == "gradient":
            model.blocks[1].register_forward_hook(spoil_gradient)
        else:
            model.blocks[1].register_forward_hook(spoil_evaluation)


def spoil_gradient(module, inputs, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * math.nan)
    return output


def spoil_evaluation(module, inputs, output):
    return output if module.training else output * math.nan


def main(data_folder: str, output: str) -> None:
    data = DataConfig(folder=data_folder, tokenizer="bytes", validation_fraction=0.1)
    sharded = {"strategy": "fsdp", "timeout_seconds": 600}
    settings = {"steps": 6, "max_skipped": 1, "eval_every": 3, "save_every": 2}
    with process_group("cpu", 600):
        for place in PLACES:
            folder = Path(output) / place
            run = distributed_run(
                data, architecture="transformer", output=folder, train=settings, parallel=sharded
            )
            try:
                train(run, callbacks=[Poison(place)])
            except NonFiniteError as error:
                told = gather_text(f"{place}: {error}\n")
                sys.stdout.write("".join(told) if world().is_main else "")
            gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
