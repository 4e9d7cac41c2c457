"""The binary mapper and the plan, in the original names."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.layers.latent import Plan, TablePostSampler, sample_plan
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.binary_latent import LARGE, MAX_LATENT_BITS, code_to_bits


class BinaryMapper(nn.Module):
    """One-hot codes drawn from bit logits, whose gradient is exact over all codes, not over the drawn one alone.

    Draws in training and in evaluation alike (the original thresholds in evaluation). A code of H bits is a vector of
    ``2**H`` numbers, and the gradient needs two more of them: 0.8 MB per token at 16 bits. The library's own
    ``sample_plan`` and ``code_lookup`` have the same gradient and never make the vectors.
    """

    def __init__(self, latent_dim: int = 16) -> None:
        super().__init__()
        check_integer("latent_dim", latent_dim)
        check(latent_dim <= MAX_LATENT_BITS, "latent_dim", latent_dim, f"at most {MAX_LATENT_BITS}")
        self.latent_dim, self.onehot_dim = latent_dim, 2**latent_dim

    def forward(self, logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B T C"]:
        plan = sample_plan(logits, generator=_global_generator(logits))
        probability = _code_probabilities(logits)
        return _one_hot(plan.code, self.onehot_dim, probability.dtype) + (probability - probability.detach())


class LatentPlan(nn.Module):
    """Draws plans as one-hot vectors, and turns them into vectors of the model's width."""

    def __init__(self, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.binary_mapper = BinaryMapper(latent_dim)
        self.latent_dim, self.onehot_dim = latent_dim, 2**latent_dim
        self.post_sampler = TablePostSampler(latent_dim, hidden_dim)

    def sample_from_logits(self, z_logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B T C"]:
        """A plan drawn from the encoder's logits, as of ``BinaryMapper``."""
        return self.binary_mapper(z_logits)

    def sample_from_prior(
        self, batch_size: int, seq_len: int, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "B T C"]:
        """Uniform codes."""
        code = torch.randint(self.onehot_dim, (batch_size, seq_len), device=device)
        return _one_hot(code, self.onehot_dim, torch.float32)

    def project_to_hidden(self, z: Float[Tensor, "B T C"] | Plan) -> Float[Tensor, "B T D"]:
        """The vector of every code; of one-hot vectors or of the library's own integer plan."""
        return self.post_sampler(z)


def _code_probabilities(logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B T C"]:
    """Of each of the ``2**H`` codes, in at least float32."""
    n_bits = logits.shape[-1]
    wide = logits.to(compute_dtype(logits)).clamp(-LARGE, LARGE)
    bits = code_to_bits(torch.arange(2**n_bits, device=logits.device), n_bits).to(wide.dtype)
    return (F.logsigmoid(wide) @ bits.T + F.logsigmoid(-wide) @ (1 - bits).T).exp()


def _one_hot(code: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*code.shape, n, dtype=dtype, device=code.device).scatter_(-1, code.unsqueeze(-1), 1)


def _global_generator(like: Tensor) -> torch.Generator:
    if like.device.type == "cuda":
        return torch.cuda.default_generators[like.device.index or 0]
    return torch.default_generator
