"""The study of channel-wise selection: how far a read stays below the maximum, what a layer learns, what it can name.

Three parts, all on the law of ``selection.data``:

- ``gaps``: mean and free energy of the same caches by the ops of the library, beside the law;
- ``learned``: one layer that reads a cache, plain attention or free energy of equal parameters and equal start;
- ``patterns``: how many assignments of tokens to channels a layer reaches, of ``t^H`` and ``t^D``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.experiments.queue import QueuedRun
from helmholtz.experiments.selection.data import SelectionTask, expected_gap, expected_maximum, sample_caches
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.fem_reading import inspect_read
from helmholtz.layers.sizing import count_parameters
from helmholtz.ops.free_energy import free_energy_read, hidden_temperature
from helmholtz.training.config import TrainConfig
from helmholtz.training.fit import fit
from helmholtz.training.optim import learning_rate, make_optimizer

BETAS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
CAPS = (40.0, 80.0)
"""Of the op: the layers' default, and the largest that float32 holds."""
GAP_TOKENS, GAP_CHANNELS = 64, 20_000
N_TEST = 1024
N_ATTRIBUTED = 256
"""Test sequences whose gradients are looked at."""
PATTERN_SIZES = ((2, 2, 4), (2, 2, 8), (3, 1, 4), (3, 2, 4), (3, 2, 6), (4, 2, 4))
"""Tokens, heads, channels."""
PATTERN_DRAWS = 20_000
PATTERN_BETA = 5.0


ReaderRead = Literal["mean", "free_energy"]
READS: dict[str, ReaderRead] = {"attention": "mean", "free energy": "free_energy"}


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer of the comparison: attention and free energy have the same parameters and differ in the read alone."""

    read: ReaderRead
    beta: float | None
    """Values start at ``beta`` times the cache; None: drawn like all else."""
    n_heads: int
    fixed: bool = True
    """Whether values stay where they start."""


MAXIMUM_READERS = {
    "attention, values fixed": Reader("mean", 1.0, 4),
    **{f"free energy, beta {beta:g}": Reader("free_energy", beta, 4) for beta in (1.0, 2.0, 5.0, 10.0, 20.0)},
    "attention, values learned": Reader("mean", 1.0, 4, fixed=False),
    "free energy, beta learned from 2": Reader("free_energy", 2.0, 4, fixed=False),
}
NAMED_READERS = {
    f"{name}, {n_heads} head{'s' * (n_heads > 1)}": Reader(read, None, n_heads, fixed=False)
    for n_heads in (1, 2, 8)
    for name, read in READS.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionStudy:
    """Settings of the learned part."""

    steps: int = 400
    batch_size: int = 64
    lr: float = 1e-2
    maximum: SelectionTask = SelectionTask(target="maximum", n_tokens=32, n_channels=16)
    named: SelectionTask = SelectionTask(target="named", n_tokens=8, n_channels=8)


def queue(study: SelectionStudy, seeds: Sequence[int]) -> list[QueuedRun]:
    """All runs, each seed whole before the next."""
    runs = []
    for seed in seeds:
        sizes = {"n_tokens": GAP_TOKENS, "n_channels": GAP_CHANNELS, "betas": list(BETAS), "caps": list(CAPS)}
        runs.append(QueuedRun(f"gaps-{seed}", {"part": "gaps", **sizes, "seed": seed}))
        for task, readers in ((study.maximum, MAXIMUM_READERS), (study.named, NAMED_READERS)):
            for label, reader in readers.items():
                settings = {
                    "part": "learned", "task": asdict(task), "label": label, "reader": asdict(reader),
                    "steps": study.steps, "batch_size": study.batch_size, "lr": study.lr, "seed": seed,
                }  # fmt: skip
                name = f"{task.target}-{label.replace(',', '').replace(' ', '_')}-{seed}"
                runs.append(QueuedRun(name, settings))
        sizes = {
            "sizes": [list(size) for size in PATTERN_SIZES],
            "draws": PATTERN_DRAWS,
            "beta": PATTERN_BETA,
        }
        runs.append(QueuedRun(f"patterns-{seed}", {"part": "patterns", **sizes, "seed": seed}))
    return runs


def compute(run: QueuedRun) -> dict[str, Any]:
    """The result of one run of ``queue``, a function of its settings alone."""
    s = run.settings
    if s["part"] == "gaps":
        return {"rows": measure_gaps(s["n_tokens"], s["n_channels"], s["betas"], s["caps"], seed=s["seed"])}
    if s["part"] == "learned":
        return learn(s)
    counts = [
        count_patterns(*size, n_draws=s["draws"], beta=s["beta"], seed=s["seed"]) for size in s["sizes"]
    ]
    return {"rows": counts}


def measure_gaps(
    n_tokens: int, n_channels: int, betas: Sequence[float], caps: Sequence[float], *, seed: int
) -> list[dict[str, Any]]:
    """Gap to the channel's maximum of the mean (``beta`` 0) and of the free energy, measured and by the law.

    Each row says which read it is: ``exact`` (float64, nothing clipped) or the op at a ``cap``; ``residual`` is the
    root mean square of what the best affine function of the read leaves of the maximum.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n_tokens, n_channels, generator=generator)
    top, mean = v.double().amax(0), v.double().mean(0)
    rows = [_row("mean", 0.0, None, top, mean, expected_maximum(n_tokens), math.inf)]
    for beta in betas:
        bound = math.log(n_tokens) / beta
        exact = _exact_read(v, beta)
        rows.append(_row("exact", beta, None, top, exact, expected_gap(n_tokens, beta), bound))
        for cap in caps:
            read = _op_read(v, beta, cap).double()
            rows.append(_row("op", beta, cap, top, read, expected_gap(n_tokens, beta, cap=cap), bound))
    return rows


def _row(
    read: str, beta: float, cap: float | None, top: Tensor, found: Tensor, law: float, bound: float
) -> dict[str, Any]:
    gap = top - found
    slope = ((top - top.mean()) * (found - found.mean())).mean() / found.var(correction=0)
    left = top - top.mean() - slope * (found - found.mean())
    return {
        "read": read,
        "beta": beta,
        "cap": cap,
        "gap": gap.mean().item(),
        "standard_error": (gap.std() / len(gap) ** 0.5).item(),
        "law": law,
        "bound": None if math.isinf(bound) else bound,
        "outside_bound": int(((gap < -1e-5) | (gap > bound + 1e-5)).sum()),
        "residual": left.square().mean().sqrt().item(),
    }


def _exact_read(v: Float[Tensor, "T D"], beta: float) -> Float[Tensor, " D"]:
    d = v.shape[1]
    prior = torch.full((d, v.shape[0]), 1 / v.shape[0], dtype=torch.float64)
    return hidden_temperature(torch.ones(d), prior, v.T, torch.full((d,), beta), num_steps=1).value


def _op_read(v: Float[Tensor, "T D"], beta: float, cap: float) -> Float[Tensor, " D"]:
    """The last token of a causal read whose queries are 0: it sees all tokens alike."""
    zeros = torch.zeros(1, 1, len(v), 2)
    temperature = torch.full((1, v.shape[1]), beta)
    return free_energy_read(zeros, zeros, v[None, None], temperature, cap=cap)[1][0, 0, -1]


def build_reader(reader: Reader, width: int) -> FreeEnergyMixer:
    """One layer without conditioning, outer gate and positions: ``read="mean"`` is attention, and nothing else differs.

    Where the reader has a ``beta``, the output starts at ``I / beta``, so that attention starts at the mean of the
    cache and free energy at its free energy, each under a prior that is nearly uniform.
    """
    layer = FreeEnergyMixer(
        FreeEnergyMixerConfig(
            d_model=width,
            n_heads=reader.n_heads,
            d_head=width // reader.n_heads,
            d_head_v=width // reader.n_heads,
            read=reader.read,
            outer_gate=False,
            tdc_width=0,
            rope_theta=0.0,
            causal=False,
            cap=40.0 if reader.read == "mean" else 80.0,
        )
    )
    if reader.beta is not None:
        with torch.no_grad():
            layer.in_proj.weight[-width:] = reader.beta * torch.eye(width)
            layer.o_proj.weight.copy_(torch.eye(width) / reader.beta)
    if reader.fixed:
        trained = torch.ones(len(layer.in_proj.weight), 1)
        trained[-width:] = 0
        layer.in_proj.weight.register_hook(lambda grad: grad * trained)
    return layer


def learn(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one layer on fresh caches, and measure it on others.

    A step whose gradient is not finite is left out and counted: with exponents of up to 80 nats the gradient of a
    sharp prior, a quotient of two of them, can leave float32.
    """
    task, reader = SelectionTask(**settings["task"]), Reader(**settings["reader"])
    config = TrainConfig(
        steps=settings["steps"], batch_size=settings["batch_size"], seq_len=task.n_tokens, lr=settings["lr"],
        warmup_steps=min(20, settings["steps"] - 1), weight_decay=0.0, seed=settings["seed"],
    )  # fmt: skip
    torch.manual_seed(config.seed)
    layer, generator = build_reader(reader, task.width), torch.Generator().manual_seed(1_000 + config.seed)

    def loss(step: int) -> Float[Tensor, ""]:
        drawn = sample_caches(task, config.batch_size, generator=generator)
        return (read_channels(layer, drawn.query, drawn.cache, task) - drawn.target).square().mean()

    skipped = fit(
        layer, range(config.steps), loss, make_optimizer(layer, config), lr=partial(learning_rate, config=config),
        clip_norm=config.clip_norm, skip_non_finite=True,
    )  # fmt: skip
    return {**measure_reader(layer, task, seed=config.seed), "skipped_steps": skipped}


def read_channels(
    layer: FreeEnergyMixer, query: Float[Tensor, "n 1 W"], cache: Float[Tensor, "n T W"], task: SelectionTask
) -> Float[Tensor, "n D"]:
    """What the layer answers for each channel."""
    answer: Tensor = layer(query, context=cache)[:, 0, : task.n_channels]
    return answer


def measure_reader(layer: FreeEnergyMixer, task: SelectionTask, *, seed: int) -> dict[str, Any]:
    """Error on fresh caches, which tokens the channels read, and ``sharpness``: values per unit of the cache, which is
    ``beta`` where they are fixed."""
    drawn = sample_caches(task, N_TEST, generator=torch.Generator().manual_seed(2_000_000 + seed))
    with torch.no_grad():
        missing = drawn.target - read_channels(layer, drawn.query, drawn.cache, task)
    part = type(drawn)(*(x[:N_ATTRIBUTED] for x in drawn))
    influence = channel_influence(layer, part.query, part.cache, task)
    rms = missing.square().mean().sqrt().item()
    return {
        "parameters": count_parameters(layer),
        "rms_error": rms,
        "mean_gap": missing.mean().item(),
        "sharpness": layer.in_proj.weight[-task.width :].norm(dim=1).mean().item(),
        "explained": 1 - missing.var().item() / drawn.target.var().item(),
        "selected": (influence.argmax(1) == part.token).double().mean().item(),
        "chance": 1 / task.n_tokens,
        "example": {
            "influence": [[round(x, 4) for x in row] for row in influence[0].T.tolist()],
            "token": part.token[0].tolist(),
        },
    }


def channel_influence(
    layer: FreeEnergyMixer, query: Float[Tensor, "n 1 W"], cache: Float[Tensor, "n T W"], task: SelectionTask
) -> Float[Tensor, "n T D"]:
    """How much each token's value moves its channel's answer: the fraction of the absolute gradients of a channel."""
    cache = cache.clone().requires_grad_()
    answer = read_channels(layer, query, cache, task)
    columns = []
    for channel in range(task.n_channels):
        (grad,) = torch.autograd.grad(answer[:, channel].sum(), cache, retain_graph=True)
        columns.append(grad[..., channel].abs())
    found = torch.stack(columns, -1)
    return found / found.sum(1, keepdim=True).clamp(min=1e-30)


def count_patterns(
    n_tokens: int, n_heads: int, n_channels: int, *, n_draws: int, beta: float, seed: int
) -> dict[str, int]:
    """How many assignments of a token to every channel come up as the largest weights of one random layer.

    ``attention`` counts those of the prior, which the channels of a head share, ``free_energy`` those of its posterior;
    ``by_heads`` and ``by_channels`` are how many there could be.
    """
    torch.manual_seed(seed)
    layer = build_reader(Reader("free_energy", beta, n_heads), n_channels)
    generator = torch.Generator().manual_seed(3_000 + seed)
    prior, posterior = set[tuple[int, ...]](), set[tuple[int, ...]]()
    for x in torch.randn(n_draws, n_tokens, n_channels, generator=generator).split(500):
        reading = inspect_read(layer, x)
        prior |= _patterns(reading.prior)
        posterior |= _patterns(reading.posterior)
    return {
        "n_tokens": n_tokens,
        "n_heads": n_heads,
        "n_channels": n_channels,
        "attention": len(prior),
        "by_heads": n_tokens**n_heads,
        "free_energy": len(posterior),
        "by_channels": n_tokens**n_channels,
    }


def _patterns(weights: Float[Tensor, "B H T S V"]) -> set[tuple[int, ...]]:
    """The largest weight's token for every channel, as the last query reads."""
    largest = weights[:, :, -1].argmax(2).flatten(1).unique(dim=0)
    return {tuple(row) for row in largest.tolist()}
