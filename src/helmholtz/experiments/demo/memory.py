"""Part of the demo: a Hopfield memory of handwritten digits, recalled from corrupted ones, and its energy."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.landscape_case import TokenCase, choose_plane, memory_case
from helmholtz.evals.landscape_flow import CLOSE, basins, saddles_between
from helmholtz.experiments.demo.settings import DemoSettings, Note
from helmholtz.experiments.recall.patterns import STRICT, Corruption, nearest_pattern
from helmholtz.experiments.vision.data import digits
from helmholtz.layers.hopfield import SAFE_MARGIN, HopfieldMemory, MarginWarning
from helmholtz.ops.hopfield import pattern_margins, pattern_scores

BETAS = (2.0, 8.0)
"""The memory's default, and one that tells a hundred digits apart."""
LEVELS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Norm of the noise over the pattern's."""
SHOWN = (Corruption("noise", 1.5), Corruption("mask", 0.5), Corruption("flip", 0.25))
WIDE = 1.25
"""Half the side of the energy's slice, in distances of the farthest pattern in it."""
N_PATHS = 10


def compute(settings: DemoSettings, note: Note) -> dict[str, Any]:
    """Digits recalled, how many as noise and their number grow, and the energy in a plane through three of them."""
    rows = _digit_rows()
    note("associative memory: recalling digits", 0.0)
    shown = _examples(rows[:10], settings.seed)
    cells = [(beta, size) for beta in BETAS for size in settings.recall_sizes]
    recalled = []
    for place, (beta, size) in enumerate(cells):
        note(f"associative memory: {size:,} digits, beta {beta:g}", 0.1 + 0.5 * place / len(cells))
        recalled += _recall(rows[:size], beta, settings)
    note("associative memory: its energy", 0.6)
    return {
        "safe_margin": SAFE_MARGIN,
        "strict": STRICT,
        "examples": shown,
        "recalled": recalled,
        "landscape": _landscape(_memory(rows[:10], BETAS[0]), settings),
    }


def _digit_rows() -> Float[Tensor, "n 64"]:
    """The training digits less their mean, the first of each class in front."""
    images = digits().train
    rows = images.pixels.flatten(1) - images.pixels.flatten(1).mean(0)
    first = [int((images.labels == digit).nonzero()[0]) for digit in range(10)]
    return torch.cat([rows[first], rows[[i for i in range(len(rows)) if i not in first]]])


def _memory(rows: Float[Tensor, "n 64"], beta: float) -> HopfieldMemory:
    memory = HopfieldMemory(rows.shape[1], 0, n_slots=len(rows), beta=beta, novelty=1.0)
    memory.write(rows)
    return memory


def _recalled(memory: HopfieldMemory, query: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarginWarning)  # the table says which margins are small
        return memory.retrieve(query).value.detach()


def _examples(rows: Float[Tensor, "n 64"], seed: int) -> list[dict[str, Any]]:
    """For each kind of corruption the stored digits, corrupted and recalled."""
    memory, generator = _memory(rows, BETAS[0]), torch.Generator().manual_seed(seed)
    patterns, own = memory.patterns(), torch.arange(len(rows))
    found = []
    for corruption in SHOWN:
        query = corruption.apply(patterns, generator=generator)
        ends = _recalled(memory, query)
        found.append(
            {
                "kind": corruption.kind,
                "level": corruption.level,
                "stored": _pixels(patterns, rows),
                "corrupted": _pixels(query, rows),
                "recalled": _pixels(ends, rows),
                "right": int((nearest_pattern(ends, patterns) == own).sum()),
                "nearest": int((nearest_pattern(query, patterns) == own).sum()),
            }
        )
    return found


def _pixels(rows: Float[Tensor, "N D"], like: Float[Tensor, "N D"]) -> list[list[float]]:
    """Patterns as pictures: the mean of all digits is added, each in the scale of the digit that it was made of."""
    mean = digits().train.pixels.flatten(1).mean(0)
    scale = like.norm(dim=-1, keepdim=True) / rows.shape[1] ** 0.25
    return [[round(x, 3) for x in row] for row in (mean + scale * rows).clamp(0, 1).tolist()]


def _recall(rows: Float[Tensor, "n 64"], beta: float, settings: DemoSettings) -> list[dict[str, Any]]:
    """A line per level of noise: what is recalled, beside the margin that is left at the query."""
    memory = _memory(rows, beta)
    patterns = memory.patterns()[memory.occupied]
    margins = pattern_margins(patterns, beta)
    generator = torch.Generator().manual_seed(settings.seed)
    lines = []
    for level in LEVELS:
        asked = torch.randint(len(patterns), (settings.recall_trials,), generator=generator)
        query = Corruption("noise", level).apply(patterns[asked], generator=generator)
        ends = _recalled(memory, query)
        scores = pattern_scores(query, patterns, beta).double()
        own = scores.gather(1, asked.unsqueeze(1)).squeeze(1)
        others = scores.scatter(1, asked.unsqueeze(1), -torch.inf).logsumexp(1)
        lines.append(
            {
                "n_patterns": len(patterns),
                "beta": beta,
                "level": level,
                "margin": margins.amin().item(),
                "safe": (margins >= SAFE_MARGIN).double().mean().item(),
                "margin_at_query": (own - others).median().item(),
                "exact": ((ends - patterns[asked]).norm(dim=-1) < STRICT * memory.radius)
                .double()
                .mean()
                .item(),
                "nearest": (nearest_pattern(query, patterns) == asked).double().mean().item(),
            }
        )
    return lines


def _landscape(memory: HopfieldMemory, settings: DemoSettings) -> dict[str, Any]:
    """Energy, basins and paths in the plane of three patterns: the first and the two most like it."""
    case = memory_case(memory, memory.patterns()[3])
    plane = choose_plane(case)
    size = WIDE * plane.coordinates(case.patterns[list(plane.anchors)]).abs().max().item()
    ticks = torch.linspace(-size, size, settings.resolution, dtype=torch.float64)
    found = basins(case, plane, ticks)
    energy = case.evaluate(plane.grid(ticks))[1].view(len(ticks), -1)
    minima = [point for point in found.attractors if point.kind == "minimum"]
    saddles = [point.z for point in saddles_between(case, minima)]
    paths = _paths(case, plane.grid(ticks), settings.seed)
    in_plane = [z for z in saddles if plane.distance(z) < STRICT * case.radius]
    return {
        "ticks": (ticks / case.radius).tolist(),
        "energy": [[round(x, 5) for x in row] for row in energy.tolist()],
        "basin": found.label.tolist(),
        "attractors": [
            {
                "pattern": point.pattern, "weight": point.pattern_weight, "energy": point.energy,
                "curvature": point.smallest_curvature, "fraction": share, "kind": point.kind,
                "place": (plane.coordinates(point.z) / case.radius).tolist(),
                "off_plane": plane.distance(point.z).item() / case.radius,
            }
            for point, share in zip(found.attractors, found.shares, strict=True)
        ],
        "saddles": [(plane.coordinates(z) / case.radius).tolist() for z in in_plane],
        "paths": [(plane.coordinates(path) / case.radius).tolist() for path in paths],
        "margin": memory.margin(),
    }  # fmt: skip


def _paths(case: TokenCase, starts: Float[Tensor, "m D"], seed: int) -> Sequence[Float[Tensor, "k D"]]:
    """Plain steps from some points of the plane."""
    chosen = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:N_PATHS]
    solver = replace(case.solver, **{**CLOSE, "mode": "picard"})
    return [replace(case, start=start).path(solver) for start in starts[chosen]]
