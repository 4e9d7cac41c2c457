"""What a model computes and how its weights begin, in a form that is stored and compared with later code.

``tools/write_checkpoints.py`` writes these numbers with old code, the tests compute them with today's.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helmholtz.cli.runs import run_config, run_parser
from helmholtz.layers.latent import Plan
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig
from helmholtz.training.run import prepare

TESTS = Path(__file__).parents[1]
CHECKPOINTS = TESTS / "models" / "checkpoints"
EXPECTED = "expected.safetensors"
INITIAL_WEIGHTS = TESTS / "models" / "initial_weights.json"
DEMO_LOSSES = TESTS / "learn" / "demo_losses.json"
DEMO = TESTS.parent / "configs" / "demo"
DEMO_BASE = DEMO.with_suffix(".yaml")
SEED, DEMO_STEPS = 3, 10
FORMER_START = {"initializer_range": 0.02}
"""The only start of old code, which has no such field."""


@torch.no_grad()
def numbers(model: nn.Module, tokens: Tensor, code: Tensor | None, **mask: Tensor) -> dict[str, Tensor]:
    """Logits of a whole pass, under the plan ``code`` if there is one, and what a plan or an equilibrium adds."""
    if code is not None:
        half = model.lower(tokens, **mask)
        return {"logits": model.upper(half, Plan(code)).logits, "bit_logits": model.posterior(half)}
    output = model(tokens, **mask)
    found = {"logits": output.logits}
    equilibrium = getattr(output, "equilibrium", None)  # of the old code only some outputs have the field
    if equilibrium is not None:
        found |= {"z": equilibrium.z, "energy": equilibrium.energy}
    return found


@torch.no_grad()
def streamed(model: nn.Module, tokens: Tensor, code: Tensor | None, **mask: Tensor) -> Tensor:
    """The logits of ``numbers`` by a prefill of half the tokens and a step for each of the others."""
    time = tokens.shape[1]
    bounds = [0, *range(time // 2, time + 1)]
    state, logits = model.init_state(len(tokens)), []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = slice(start, stop)
        plan = {} if code is None else {"z": Plan(code[:, part])}
        masks = {name: value[:, part] for name, value in mask.items()}
        output = model.step(tokens[:, part], state, **plan, **masks)
        state = output.state
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def initial_model(architecture: str, options: dict[str, Any]) -> nn.Module:
    """The model of these options as ``SEED`` begins it at 0.02, which old code had at all widths."""
    kind = MODELS[architecture].config_class
    config = kind.from_dict(FORMER_START | options if _knows_starts(kind) else options)
    torch.manual_seed(SEED)
    return MODELS[architecture](config)


def _knows_starts(kind: type) -> bool:
    return "initializer_range" in {field.name for field in dataclasses.fields(kind)}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """A checksum of all tensors, and of each the shape, sum, sum of squares, and a sum that knows the order."""
    digest, tensors = hashlib.sha256(), {}
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        x = tensor.double().flatten()
        order = torch.arange(1, len(x) + 1, dtype=torch.float64).sin()
        sums = [x.sum(), x.square().sum(), (x * order).sum()]
        tensors[name] = {"shape": list(tensor.shape), "sums": [float(f"{value:.10g}") for value in sums]}
    return {"sha256": digest.hexdigest(), "tensors": tensors}


def differences(found: dict[str, Any], stored: dict[str, Any]) -> dict[str, float]:
    """By tensor, the largest error of its sums over the one that a relative error of 1 in every element can make."""
    worst = {}
    for name, tensor in stored["tensors"].items():
        square = tensor["sums"][1]
        size = math.sqrt(math.prod(tensor["shape"]) * square)
        errors = [abs(a - b) for a, b in zip(found["tensors"][name]["sums"], tensor["sums"], strict=True)]
        scaled = zip(errors, (size, 2 * square, size), strict=True)
        worst[name] = max(error / scale if scale else error for error, scale in scaled)
    return worst


def demo_settings(data: Path) -> list[str]:
    return [f"--data.folder={data}", "--train.seed=0", "--train.threads=1", "--train.device=cpu"]


def demo_steps(name: str, data: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of the first steps of a model of the demo, trained by the command line from 0.02."""
    arguments = [f"--config={DEMO_BASE}", f"--config={DEMO / name}.yaml", *demo_settings(data)]
    if _knows_starts(ModelConfig):
        arguments += [f"--model.{field}={value}" for field, value in FORMER_START.items()]
    trainer = prepare(run_config(run_parser("train", "", arguments), arguments)[0])
    trainer.model.train()
    records = [trainer.step() for _ in range(DEMO_STEPS)]
    return [{"loss": record.loss, "grad_norm": record.grad_norm} for record in records]
