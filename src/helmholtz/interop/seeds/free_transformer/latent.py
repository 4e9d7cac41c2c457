"""The binary mapper and the plan, in the original names."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.layers.latent import Plan, TablePostSampler, sample_plan
from helmholtz.ops.binary_latent import code_lookup

MAX_DENSE_BITS = 10
"""Beyond it a one-hot vector per token is no sensible representation of a code."""


class BinaryMapper(nn.Module):
    """One-hot codes drawn from bit logits, whose gradient is exact over all codes, not over the drawn one alone.

    Draws in training and in evaluation alike (the original thresholds in evaluation).

    Raises: ValueError for more than 10 bits, a dense vector of more than 1024 numbers per token: ``LatentPlan`` holds
        any code as an integer.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_integer("latent_dim", latent_dim)
        wanted = f"at most {MAX_DENSE_BITS} for one-hot vectors; LatentPlan takes up to 16"
        check(latent_dim <= MAX_DENSE_BITS, "latent_dim", latent_dim, wanted)
        self.register_buffer("codes", torch.eye(2**latent_dim), persistent=False)

    codes: Float[Tensor, "C C"]

    def forward(self, logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B T C"]:
        plan = sample_plan(logits, generator=_global_generator(logits))
        return code_lookup(self.codes, plan.code, plan.logits)


class LatentPlan(nn.Module):
    """Draws plans and turns them into vectors.

    A plan is a ``helmholtz.layers.latent.Plan``, integer codes with the logits they were drawn from, where the
    original has one-hot vectors: at 16 bits those are 65,536 numbers per token.
    """

    def __init__(self, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.post_sampler = TablePostSampler(latent_dim, hidden_dim)

    def sample_from_logits(self, z_logits: Float[Tensor, "B T H"]) -> Plan:
        """A plan drawn from the encoder's logits."""
        return sample_plan(z_logits, generator=_global_generator(z_logits))

    def sample_from_prior(self, batch_size: int, seq_len: int, device: torch.device | str = "cpu") -> Plan:
        """Uniform codes."""
        return Plan(torch.randint(2**self.latent_dim, (batch_size, seq_len), device=device))

    def project_to_hidden(self, z: Plan) -> Float[Tensor, "B T D"]:
        """The vector of every code."""
        return self.post_sampler(z)


def _global_generator(like: Tensor) -> torch.Generator:
    if like.device.type == "cuda":
        return torch.cuda.default_generators[like.device.index or 0]
    return torch.default_generator
