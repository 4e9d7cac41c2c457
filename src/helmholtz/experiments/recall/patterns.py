"""How many patterns a Hopfield memory holds: recall from corrupted ones, beside an oracle and the nearest neighbour.

The memory is measured as it is: plain recall from a written query, nothing is trained and there is no context, so that
the gain ``delta`` of the token energy and its ``kappa`` do not enter.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_fraction, check_integer, check_non_negative
from helmholtz.layers.hopfield import HopfieldMemory, MarginWarning
from helmholtz.layers.key_value_memory import KeyValueMemory

CorruptionKind = Literal["noise", "mask", "flip"]

STRICT = 0.1
"""Distance from the pattern, in radii, within which it counts as recalled exactly."""
ORACLE_STEPS = 200
ORACLE_RTOL = 1e-4
N_LABELS = 10


@dataclass(frozen=True, slots=True)
class Corruption:
    """How a stored pattern is corrupted to make a query."""

    kind: CorruptionKind
    level: float
    """"noise": norm of the Gaussian noise over the pattern's. "mask", "flip": fraction of coordinates set to 0, or
    negated."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(CorruptionKind))
        if self.kind == "noise":
            check_non_negative("level", self.level)
        else:
            check_fraction("level", self.level, below_one=False)

    def apply(self, patterns: Float[Tensor, "N D"], *, generator: torch.Generator) -> Float[Tensor, "N D"]:
        if self.kind == "noise":
            direction = F.normalize(torch.randn(patterns.shape, generator=generator), dim=-1)
            return patterns + self.level * patterns.norm(dim=-1, keepdim=True) * direction
        number = round(self.level * patterns.shape[1])
        chosen = torch.rand(patterns.shape, generator=generator).argsort(1) < number
        return torch.where(chosen, 0.0 if self.kind == "mask" else -patterns, patterns)


@dataclass(frozen=True, slots=True)
class RecallResult:
    """Recall of one setting, over all trials."""

    d_model: int
    n_patterns: int
    beta: float
    corruption: Corruption
    n_trials: int
    n_sets: int
    margin: float
    """The smallest of all patterns, in nats (``HopfieldMemory.margin``)."""
    warned: bool
    """Whether the memory said that a pattern it recalled has a small margin."""
    accuracy: float
    """Fraction of trials whose equilibrium is closest to the pattern that was corrupted."""
    strict: float
    """Share within ``STRICT`` radii of it."""
    oracle: float
    """Accuracy of a plain float64 iteration on the same queries."""
    nearest: float
    """Accuracy of the pattern nearest to the query: no recall can be expected to beat it."""
    converged: float
    num_steps_mean: float
    num_steps_max: int
    energy_hit: float | None
    """Mean energy where the recall was right; None if it never was."""
    energy_miss: float | None
    auroc: float | None
    """Probability that a right recall has the lower energy than a wrong one; None without either."""

    @property
    def standard_error(self) -> float:
        """Of ``accuracy``, as of independent trials."""
        return math.sqrt(self.oracle * (1 - self.oracle) / self.n_trials)

    def agrees(self) -> bool:
        """Whether memory and oracle differ by no more than .01 and three standard errors."""
        return abs(self.accuracy - self.oracle) <= 0.01 + 3 * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {**asdict(self), "agrees": self.agrees()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RecallResult":
        """What ``to_dict`` gave, also as JSON brings it back."""
        own = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{**own, "corruption": Corruption(**own["corruption"])})


def recall_patterns(
    d_model: int,
    n_patterns: int,
    corruption: Corruption,
    *,
    beta: float = 2.0,
    n_trials: int = 4096,
    n_sets: int = 5,
    seed: int = 0,
) -> RecallResult:
    """Spoil random patterns and recall them.

    Args:
        n_trials: queries at least; each of the ``n_sets`` memories of fresh random patterns gets as many.

    Raises: ValueError unless all sizes are positive.
    """
    check_integer("n_trials", n_trials)
    check_integer("n_sets", n_sets)
    per_set = -(-n_trials // n_sets)
    parts = [_one_set(d_model, n_patterns, corruption, beta, per_set, seed + 1000 * i) for i in range(n_sets)]
    hit, strict, oracle, nearest, converged = (
        torch.cat([part[i] for part in parts]).double() for i in range(5)
    )
    steps, energy = (torch.cat([part[i] for part in parts]).double() for i in (5, 6))
    right = hit.bool()
    return RecallResult(
        d_model=d_model,
        n_patterns=n_patterns,
        beta=beta,
        corruption=corruption,
        n_trials=len(hit),
        n_sets=n_sets,
        margin=min(part[7] for part in parts),
        warned=any(part[8] for part in parts),
        accuracy=hit.mean().item(),
        strict=strict.mean().item(),
        oracle=oracle.mean().item(),
        nearest=nearest.mean().item(),
        converged=converged.mean().item(),
        num_steps_mean=steps.mean().item(),
        num_steps_max=int(steps.max()),
        energy_hit=_mean(energy[right]),
        energy_miss=_mean(energy[~right]),
        auroc=auroc(energy[~right], energy[right]),
    )


def _one_set(
    d_model: int, n_patterns: int, corruption: Corruption, beta: float, n_trials: int, seed: int
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    memory = HopfieldMemory(d_model, n_patterns, beta=beta)
    with torch.no_grad():
        memory.memory_patterns.copy_(torch.randn(n_patterns, d_model, generator=generator))
        patterns = memory.patterns()
    asked = torch.randint(n_patterns, (n_trials,), generator=generator)
    query = corruption.apply(patterns[asked], generator=generator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = memory.retrieve(query)
    distance = (solution.value - patterns[asked]).norm(dim=-1)
    return (
        nearest_pattern(solution.value, patterns) == asked,
        distance < STRICT * memory.radius,
        nearest_pattern(oracle_recall(query, patterns, beta), patterns) == asked,
        nearest_pattern(query, patterns) == asked,
        solution.converged,
        solution.num_steps,
        solution.energy,
        memory.margin(),
        any(issubclass(warning.category, MarginWarning) for warning in caught),
    )


def nearest_pattern(z: Float[Tensor, "N D"], patterns: Float[Tensor, "K D"]) -> Int[Tensor, "N"]:
    """The pattern at the smallest distance, in float64; patterns have one norm."""
    return (z.double() @ patterns.double().T).argmax(-1)


def oracle_recall(
    query: Float[Tensor, "N D"], patterns: Float[Tensor, "K D"], beta: float
) -> Float[Tensor, "N D"]:
    """The retrieval steps in plain float64 until a query rests: shares no line with the memory that it checks."""
    z, rows, active = query.double().clone(), patterns.double(), torch.arange(len(query))
    for _ in range(ORACLE_STEPS):
        scores = beta * z[active] @ rows.T
        share = torch.exp(scores - scores.amax(1, keepdim=True))
        new = share @ rows / share.sum(1, keepdim=True)
        moved = (new - z[active]).norm(dim=1) / (new.norm(dim=1) + 1e-9)
        z[active] = new
        active = active[moved >= ORACLE_RTOL]
        if not len(active):
            break
    return z


def auroc(high: Float[Tensor, "n"], low: Float[Tensor, "m"]) -> float | None:
    """Probability that a number of ``high`` is above one of ``low``, ties counting half; None without either."""
    if not len(high) or not len(low):
        return None
    _, rank = torch.cat([high, low]).unique(return_inverse=True)
    counts = torch.bincount(rank).double()
    middle = counts.cumsum(0) - (counts - 1) / 2
    wins = middle[rank[: len(high)]].sum() - len(high) * (len(high) + 1) / 2
    return (wins / (len(high) * len(low))).item()


def _mean(x: Tensor) -> float | None:
    return x.mean().item() if len(x) else None


@dataclass(frozen=True, slots=True)
class AssociationResult:
    """Values recalled from keys, by equilibrium from ``[key | 0]``."""

    d_key: int
    n_pairs: int
    beta: float
    noise: float
    """Norm of the noise on the key over the key's."""
    n_trials: int
    n_sets: int
    accuracy: float
    oracle: float
    """Of a plain float64 iteration on the same queries."""
    nearest: float
    """Value of the stored key nearest to the query."""
    answered: float
    num_steps_mean: float
    num_steps_max: int

    def agrees(self) -> bool:
        """As ``RecallResult.agrees``."""
        return abs(self.accuracy - self.oracle) <= 0.01 + 3 * math.sqrt(
            self.oracle * (1 - self.oracle) / self.n_trials
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AssociationResult":
        """What ``to_dict`` gave, also as JSON brings it back."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def recall_values(
    d_key: int,
    n_pairs: int,
    *,
    beta: float,
    noise: float,
    n_trials: int = 4096,
    n_sets: int = 5,
    seed: int = 0,
) -> AssociationResult:
    """Write random pairs of keys and ``N_LABELS`` values, and read values by noisy keys."""
    check_integer("n_sets", n_sets)
    hits: list[Bool[Tensor, N]] = []
    oracles, neighbours, answered, steps = [], [], [], []
    for i in range(n_sets):
        generator = torch.Generator().manual_seed(seed + 1000 * i)
        memory = KeyValueMemory(d_key, N_LABELS, n_pairs, beta=beta, seed=seed + 1000 * i)
        keys = F.normalize(torch.randn(n_pairs, d_key, generator=generator), dim=-1)
        values = torch.randint(N_LABELS, (n_pairs,), generator=generator)
        memory.write(keys, values)
        asked = torch.randint(n_pairs, (-(-n_trials // n_sets),), generator=generator)
        query = F.normalize(Corruption("noise", noise).apply(keys[asked], generator=generator), dim=-1)
        reading = memory.read(query)
        start = torch.cat([query, torch.zeros_like(query)], dim=1) * (memory.radius / 2**0.5)
        by_oracle = oracle_recall(start, memory.store.rows, beta)[:, d_key:] @ memory.values.double().T
        hits.append(reading.value == values[asked])
        oracles.append(by_oracle.argmax(-1) == values[asked])
        neighbours.append(values[nearest_pattern(query, keys)] == values[asked])
        answered.append(reading.answered)
        steps.append(reading.solution.num_steps)
    hit, oracle, nearest, sure, taken = (
        torch.cat(parts).double() for parts in (hits, oracles, neighbours, answered, steps)
    )
    return AssociationResult(
        d_key, n_pairs, beta, noise, len(hit), n_sets, hit.mean().item(), oracle.mean().item(),
        nearest.mean().item(), sure.mean().item(), taken.mean().item(), int(taken.max()),
    )  # fmt: skip


def by_size_and_level(results: Sequence[RecallResult]) -> dict[int, dict[float, float]]:
    """Accuracies as ``{n_patterns: {level: accuracy}}``, of results that share width, beta and kind."""
    kinds = {(result.d_model, result.beta, result.corruption.kind) for result in results}
    check(len(kinds) <= 1, "results", sorted(map(str, kinds)), "of one width, beta and kind of corruption")
    table: dict[int, dict[float, float]] = {}
    for result in results:
        table.setdefault(result.n_patterns, {})[result.corruption.level] = result.accuracy
    return table
