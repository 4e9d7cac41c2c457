"""A training step and a decoded token of every architecture at the demo's sizes, all through the same path.

    python benchmarks/models/architectures.py --threads 2
    python tools/against.py 252ba62 benchmarks/models/architectures.py --threads 2     # beside another commit

Models of ``configs/demo`` (0.8 M parameters beside the embedding). A training step is loss, backward, clipping and
AdamW on 8 x 128 tokens; decoding continues a prompt of 64 tokens by 64 at batch 1, by ``generate``, as users do, and by
calls of ``step`` alone, greedily.

Floor: a step multiplies 6 weights per parameter and token, 6 GFLOP; a decoded token reads each weight once, 4 MB.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import ROOT, interleave, parse_options, print_table, write_results

from helmholtz.models import MODELS
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.training.config import TrainConfig
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.objectives import next_token
from helmholtz.training.optim import make_optimizer

BATCH, TIME, PROMPT, NEW = 8, 128, 64, 64
VOCABULARY = 2048


def demo_models() -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    shared = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["model"]
    for path in sorted((ROOT / "configs" / "demo").glob("*.yaml")):
        options: dict[str, Any] = shared | yaml.safe_load(path.read_text())["model"]
        cls = MODELS[options.pop("architecture")]
        torch.manual_seed(0)
        models[path.stem] = cls(cls.config_class.from_dict({**options, "vocab_size": VOCABULARY}))
    return models


def objective_of(model: nn.Module) -> Callable[[nn.Module, Tensor, int], Any]:
    if getattr(model, "encoder", None) is not None:
        return FreeBitsObjective(FreeBitsConfig())
    if getattr(model, "equilibrium", None) is not None:
        return EquilibriumObjective(EquilibriumObjectiveConfig())
    return next_token


def training_step(model: nn.Module) -> Callable[[], None]:
    optimizer = make_optimizer(model, TrainConfig(output_dir="unused", steps=1, warmup_steps=0))
    objective, tokens = objective_of(model), torch.randint(VOCABULARY, (BATCH, TIME + 1))

    def run() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        objective(model, tokens, 0).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def stepping(model: nn.Module, prompt: list[int]) -> Callable[[], list[int]]:
    """The prompt and ``NEW`` steps, each of the token that is likeliest after the last."""

    @torch.no_grad()
    def run() -> list[int]:
        model.eval()
        tokens, state, found = torch.tensor([prompt]), model.init_state(1), []
        for _ in range(NEW):
            output = model.step(tokens, state)
            tokens, state = output.logits[:, -1:].argmax(-1), output.state
            found.append(int(tokens))
        return found

    return run


def check(model: nn.Module) -> None:
    """Steps give the logits of the whole; a Free Transformer draws plans, so its own test holds it."""
    if getattr(model, "encoder", None) is not None:
        return
    tokens = torch.randint(VOCABULARY, (1, 9))
    with torch.no_grad():
        first = model.eval().step(tokens[:, :5], model.init_state(1))
        steps = torch.cat([first.logits, model.step(tokens[:, 5:], first.state).logits], dim=1)
        torch.testing.assert_close(steps, model(tokens).logits, rtol=1e-3, atol=1e-3)


def main() -> None:
    options = parse_options("architectures", __doc__)
    models = demo_models()
    for model in models.values():
        check(model)
    prompt, settings = list(range(1, PROMPT + 1)), SamplingSettings(max_new_tokens=NEW)
    training = interleave(
        {name: training_step(model) for name, model in models.items()}, rounds=options.rounds
    )
    decode = interleave(
        {name: lambda model=model: generate(model, [prompt], settings) for name, model in models.items()},
        rounds=options.rounds,
        warmup=1,
    )
    steps = interleave(
        {name: stepping(model, prompt) for name, model in models.items()}, rounds=options.rounds, warmup=1
    )
    rows = [
        {
            "model": name,
            "training_ms": 1e3 * training[name],
            "train_tokens_per_s": BATCH * TIME / training[name],
            "decode_ms_per_token": 1e3 * decode[name] / NEW,
            "decode_tokens_per_s": NEW / decode[name],
            "step_ms_per_token": 1e3 * steps[name] / NEW,
            "step_tokens_per_s": NEW / steps[name],
        }
        for name in models
    ]
    print_table(rows)
    write_results(options, rows)


if __name__ == "__main__":
    main()
