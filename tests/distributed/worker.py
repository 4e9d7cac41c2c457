"""What torchrun starts in the tests: some runs, one after the other, in one process group."""

import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from distributed_cases import distributed_run, half_of
from helmholtz.data.prepare import DataConfig
from helmholtz.interop.seeds.free_transformer import FreeTransformer, train_utils
from helmholtz.interop.seeds.free_transformer.config import ModelConfig
from helmholtz.training.distributed import on_main, process_group, world
from helmholtz.training.parallel import full_tensor
from helmholtz.training.run import train


def main(file):
    description = json.loads(Path(file).read_text())
    data = DataConfig(**description["data"])
    with process_group("cpu", 60):
        assert world().size == description["size"]
        for case in description["cases"]:
            source, targets, step = case.pop("halves", (None, (), 0))
            for target in targets:
                on_main(lambda source=source, target=target, step=step: half_of(source, Path(target), step))
            train(distributed_run(data, **case))
    check_facade()


def check_facade():
    """The original's functions: a wrapped model has the loss and the gradient of the model."""
    place = train_utils.setup_distributed()
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, hidden_dim=32, num_layers=2, num_heads=2, latent_dim=4, max_seq_len=32, num_kv_heads=2
    )
    model = FreeTransformer(config)
    tokens = torch.randint(40, (4, 16))
    with process_group("cpu", 60):
        assert place == (world().rank, 2, world().rank)
        losses, norms = [], []
        for wrapped in (False, True):
            if wrapped:
                train_utils.wrap_model_fsdp(model, mixed_precision=False, min_num_params=100)
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            model.zero_grad()
            torch.manual_seed(1)
            loss = model(tokens, mode="training")[0].square().mean()
            loss.backward()
            losses.append(loss.item())
            gradients = [full_tensor(p.grad).norm() for p in model.parameters() if p.grad is not None]
            norms.append(torch.stack(gradients).norm().item())
        assert math.isclose(*losses, rel_tol=1e-6), losses
        assert math.isclose(*norms, rel_tol=1e-5), norms
    train_utils.cleanup_distributed()


if __name__ == "__main__":
    main(sys.argv[1])
    # Threads of the process groups can abort the end of the interpreter ("terminate called without an active
    # exception", once in a dozen times); all that the tests read is on disk by now.
    sys.stdout.flush()
    os._exit(0)
