"""What checks and figures of equilibria have in common: precision, the map's Jacobian, where equilibria can lie."""

from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.layers.equilibrium import Equilibrium, TokenProblem
from helmholtz.layers.latent import Plan
from helmholtz.layers.placement import device_of
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, require_equilibrium
from helmholtz.models.outputs import LMOutput
from helmholtz.ops.token_energy import EnergyParameters, TokenField
from helmholtz.solvers import AbstractProblem

ProblemT = TypeVar("ProblemT", bound=AbstractProblem)


def read(model: Decoder, tokens: Int[Tensor, "B T"], *, z_init: Tensor | None = None) -> LMOutput:
    """A call that can be repeated: a model with plans reads every row under the same one, drawn from its prior."""
    z = None
    if model.plan is not None:
        code = model.sample_prior(1, tokens.shape[1], generator=torch.Generator().manual_seed(0)).code
        z = Plan(code.expand(len(tokens), -1))
    output: LMOutput = model(tokens, z=z, z_init=z_init)
    return output


def equilibrium_of(model: Decoder, tokens: Int[Tensor, "B T"]) -> Equilibrium:
    """The equilibria of a text, without gradients, the model in evaluation mode and afterwards as it was."""
    with evaluation_mode(model):
        require_equilibrium(model)
        found = read(model, tokens).equilibrium
    assert found is not None
    return found


def random_tokens(model: Decoder, batch: int, time: int, *, generator: torch.Generator) -> Int[Tensor, "B T"]:
    """Ids drawn uniformly from the vocabulary. Raises: ValueError for a length beyond the model's."""
    check_integer("batch", batch)
    check_integer("time", time)
    longest = model.config.max_seq_len
    check(time <= longest, "time", time, f"at most max_seq_len={longest}")
    ids = torch.randint(model.config.vocab_size, (batch, time), generator=generator)
    return ids.to(device_of(model))


def in_double(problem: TokenProblem) -> TokenProblem:
    """The same energies in float64, cut off from whatever they were computed from."""
    field = TokenField(*(x.detach().double() for x in problem.field))
    weight, patterns, log_prior, kappa, strength, beta = problem.parameters
    prior = None if log_prior is None else log_prior.detach().double()
    weight, patterns, kappa, strength = (x.detach().double() for x in (weight, patterns, kappa, strength))
    return TokenProblem(field, EnergyParameters(weight, patterns, prior, kappa, strength, beta))


def repeated(problem: ProblemT, row: int, n: int) -> ProblemT:
    """``n`` rows, all of them the problem of ``row``; of all its points one call computes map and energy."""
    return problem.take(torch.full((n,), row))


def active_patterns(parameters: EnergyParameters) -> Float[Tensor, "K D"]:
    """The rows of the memory that are not empty."""
    if parameters.log_prior is None:
        return parameters.patterns
    return parameters.patterns[~torch.isneginf(parameters.log_prior)]


def pattern_norm(parameters: EnergyParameters, *, empty: float = 1.0) -> float:
    """The norm ``R`` of the patterns; ``empty`` without any."""
    patterns = active_patterns(parameters)
    return patterns.norm(dim=-1).amax().item() if len(patterns) else empty


def equilibrium_ball(problem: TokenProblem) -> Float[Tensor, "N"]:
    r"""Each row's bound of :math:`|f|`, whatever the state: :math:`|u| + \kappa |W|_2 |\gamma| + \lambda R`.

    Every equilibrium lies in this ball around 0, and every iterate after the first.
    """
    field, parameters = problem.field, problem.parameters
    norm = torch.linalg.matrix_norm(parameters.weight.double(), 2).to(parameters.weight.dtype)
    emitted = parameters.kappa * norm * field.gate.norm(dim=-1)
    return field.u.norm(dim=-1) + emitted + parameters.strength * pattern_norm(parameters, empty=0.0)


def points_in_ball(problem: TokenProblem, *, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """A point per row of its equilibrium ball, in a random direction, its distance from 0 uniform: in many dimensions
    the centre is seen as well."""
    direction = random_directions(problem.field.u, generator=generator)
    length = torch.rand(len(direction), 1, generator=generator, dtype=torch.float64).to(direction)
    return equilibrium_ball(problem).unsqueeze(-1) * length * direction


def random_directions(like: Float[Tensor, "N D"], *, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """A random unit vector per row."""
    direction = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(direction, dim=-1).to(like)


def jacobian(problem: AbstractProblem, row: int, z: Float[Tensor, "D"]) -> Float[Tensor, "D D"]:
    """The map's Jacobian at one point of one row, dense: ``D`` products in one call."""
    identity = torch.eye(len(z), dtype=z.dtype, device=z.device)
    return repeated(problem, row, len(z)).jvp(z.expand_as(identity), identity).T
