"""Does a trained Llama gain from reading free energies? A tiny one, three seeds, every setting fixed below.

    python examples/llama_free_energy.py        # 10 to 15 minutes of one core; resumed by seeds

Trains a Llama of transformers of 1.05 M parameters on the complete Shakespeare, then continues from it in four ways
for equally many steps on equal batches: the new parameters of use_free_energy alone; of these the outer gate alone
(alpha stays 0, so that no free energy is read: a control); all parameters with them; all parameters without. The model
as it was is the baseline. Validation loss in nats per token, on the same windows for all.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.data.tokens import TokenDataset
from helmholtz.interop.hf.free_energy import use_free_energy

DATA = DataConfig(folder="data/shakespeare")
LENGTH, BATCH, N_WINDOWS = 128, 8, 128
PRETRAIN_STEPS, TUNE_STEPS, WARMUP = 400, 150, 20
PRETRAIN_LR, NEW_LR, OLD_LR = 4e-3, 1e-2, 1e-3
"""Of the training from scratch (the demo's), of new parameters, of old ones in a fine-tune."""


def llama(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0; as a factor."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train(model: LlamaForCausalLM, groups: list[dict], data: TokenDataset, steps: int, seed: int) -> float:
    """Train in place; the loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    generator, losses = torch.Generator().manual_seed(seed), []
    trained = [parameter for group in groups for parameter in group["params"]]
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        tokens = data.read(starts, LENGTH + 1)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@torch.no_grad()
def validate(model: LlamaForCausalLM, data: TokenDataset) -> float:
    """Nats per token over windows spread evenly over the split."""
    starts = torch.linspace(0, len(data) - LENGTH - 1, N_WINDOWS).long()
    model.eval()
    losses = [
        model(tokens, labels=tokens).loss.double() for tokens in data.read(starts, LENGTH + 1).split(BATCH)
    ]
    return (sum(losses) / len(losses)).item()


def group(parameters: Iterable[torch.nn.Parameter], lr: float) -> dict:
    return {"params": list(parameters), "lr": lr}


def tuned(model: LlamaForCausalLM, way: str) -> tuple[LlamaForCausalLM, list[dict]]:
    """A copy of the model, and what of it is trained."""
    model = copy.deepcopy(model)
    old = list(model.parameters())
    if way == "all_without":
        return model, [group(old, OLD_LR)]
    new = use_free_energy(model, freeze=way != "all_with")
    if way == "outer_gate_alone":
        outer = [p for name, p in model.named_parameters() if name.endswith("free_energy.outer.weight")]
        return model.requires_grad_(False), [group((p.requires_grad_() for p in outer), NEW_LR)]
    return model, [group(new, NEW_LR)] + ([group(old, OLD_LR)] if way == "all_with" else [])


WAYS = ("new_alone", "outer_gate_alone", "all_with", "all_without")


def measure(seed: int, ways: tuple[str, ...], console: Console) -> dict[str, dict[str, float]]:
    """Validation loss and counts of the trained model and of every way to go on from it."""
    data = prepare(DATA)
    torch.manual_seed(seed)
    model, begin = llama(data.metadata.vocab_size), time.process_time()
    train(model, [group(model.parameters(), PRETRAIN_LR)], data.train, PRETRAIN_STEPS, seed)
    found = {"unchanged": {"validation": validate(model, data.validation), "trained_parameters": 0}}
    found["unchanged"]["cpu_seconds"] = time.process_time() - begin
    for way in ways:
        begin = time.process_time()
        changed, groups = tuned(model, way)
        at_start = validate(changed, data.validation)
        assert at_start == found["unchanged"]["validation"], "the start must be the model as it was"
        last = train(changed, groups, data.train, TUNE_STEPS, seed + 1000)
        found[way] = {
            "validation": validate(changed, data.validation),
            "training": last,
            "trained_parameters": sum(p.numel() for g in groups for p in g["params"]),
            "cpu_seconds": time.process_time() - begin,
        }
        if way != "all_without":
            gates = [m for name, m in changed.named_modules() if name.endswith("free_energy")]
            found[way]["mean_abs_alpha"] = torch.cat([m.alpha.flatten() for m in gates]).abs().mean().item()
            found[way]["median_beta"] = torch.cat([m.beta.flatten() for m in gates]).median().item()
    for way, numbers in found.items():
        console.print(f"seed {seed}, {way}: validation {numbers['validation']:.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path("results/free_energy_llama/results.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    cells = json.loads(arguments.output.read_text())["cells"] if arguments.output.exists() else []
    for seed in arguments.seeds:
        if any(cell["seed"] == seed for cell in cells):
            continue
        cells.append({"seed": seed, "result": measure(seed, tuple(arguments.ways), console)})
        settings = {
            "length": LENGTH, "batch": BATCH, "pretrain_steps": PRETRAIN_STEPS, "tune_steps": TUNE_STEPS,
            "pretrain_lr": PRETRAIN_LR, "new_lr": NEW_LR, "old_lr": OLD_LR, "validation_windows": N_WINDOWS,
        }  # fmt: skip
        content = {
            "commit": git_commit(),
            "hardware": describe_hardware(),
            "settings": settings,
            "cells": cells,
        }
        write_atomically(arguments.output, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
