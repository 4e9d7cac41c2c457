"""The models and their parts in the original names, on the library's own."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.interop.seeds.free_transformer.config import ModelConfig
from helmholtz.layers import mlp
from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.latent import LatentEncoder, Plan, TablePostSampler, sample_plan
from helmholtz.layers.sequence import sequence_layout
from helmholtz.models import free_transformer, transformer
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.outputs import LowerOutput
from helmholtz.ops._compute import compute_dtype
from helmholtz.ops.binary_latent import LARGE, MAX_LATENT_BITS, code_to_bits
from helmholtz.ops.rope import rope


class RMSNorm(nn.RMSNorm):
    """Norm over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions; angles in float32, of any position up to ``max_seq_len``."""

    def __init__(self, dim: int, max_seq_len: int = 2048, base: float = 10000) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.base = dim, max_seq_len, base

    def forward(
        self, q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T G K"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T G K"]]:
        _check_length("q", q.shape[1], self.max_seq_len)
        check(q.shape[-1] == self.dim, "q", tuple(q.shape), f"of width {self.dim}")
        positions = torch.arange(q.shape[1], device=q.device)
        turned = [rope(x.transpose(1, 2), positions, theta=self.base).transpose(1, 2) for x in (q, k)]
        return turned[0], turned[1]


class SwiGLU(mlp.SwiGLU):
    """Gated feed-forward; ``gate_up_proj`` holds the original's ``w1`` above its ``w3``, ``down_proj`` its ``w2``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)


class TransformerBlock(nn.Module):
    """Pre-norm block whose keys and values may come from another stream.

    Raises: ValueError for ``use_rope=False``, which nothing here has.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        ffn_dim: int,
        dropout: float = 0.0,
        causal: bool = True,
        use_rope: bool = True,
        max_seq_len: int = 2048,
    ) -> None:
        super().__init__()
        check(use_rope is True, "use_rope", use_rope, "True: without it tokens have no position")
        self.max_seq_len = max_seq_len
        attention = Attention(dim, num_heads, n_kv_heads=num_kv_heads, causal=causal)
        self.block = Block(attention, mlp.SwiGLU(dim, ffn_dim), dim, dropout=dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        kv_input: Float[Tensor, "B T D"] | None = None,
        mask: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """One block.

        Args:
            kv_input: what keys and values are made of, behind the norm that ``x`` has too (the original leaves it
                unnormalised).
            mask: ``B T``, non-zero where a token is real (the original: ``B 1 T T``, in place of the causal one).
        """
        _check_length("x", x.shape[1], self.max_seq_len)
        return self.block(x, source=kv_input, attention_mask=mask)


class EncoderBlock(nn.Module):
    """Bit logits of every token from the whole context. With rotary positions: the original has none, and gives all
    tokens the same logits."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, latent_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        attention = Attention(dim, num_heads, causal=False)
        block = Block(attention, mlp.SwiGLU(dim, ffn_dim), dim, dropout=dropout)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.latent_dim = latent_dim
        self.encoder = LatentEncoder(block, dim, latent_dim, norm_eps=1e-6)
        self.encoder.query = nn.Parameter(self.encoder.query.detach().view(1, 1, dim))  # the original's shape
        self.register_load_state_dict_pre_hook(_reshape_query)

    @property
    def zeta(self) -> nn.Parameter:
        """The learned query, ``encoder.query``."""
        return self.encoder.query

    @property
    def readout(self) -> nn.Linear:
        """From the width to the bits, ``encoder.readout``."""
        return self.encoder.readout

    def forward(self, context: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        return self.encoder(context, sequence_layout(context))


class InjectionMechanism(nn.Module):
    """What the middle block's keys and values are made of: the context with the plan added."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(
        self, context: Float[Tensor, "B T D"], z_projected: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T D"]:
        width = z_projected.shape[-1]
        check(width == self.hidden_dim, "z_projected", tuple(z_projected.shape), f"{self.hidden_dim} wide")
        return context + z_projected


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


class FreeTransformer(nn.Module):
    """``helmholtz.models.FreeTransformer`` built from the original config; the model itself is ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.model = free_transformer.FreeTransformer(config.to_core())

    def forward(
        self, tokens: Shaped[Tensor, "..."], mode: Literal["training", "inference"] = "training"
    ) -> tuple[Float[Tensor, "B T vocab"], Float[Tensor, "B T H"] | None]:
        """Logits of the next tokens, and the bit logits of the plan if the encoder made it.

        Args:
            mode: "training" draws the plan from the encoder, which has read all tokens: the logits leak what is to be
                predicted, and no perplexity of theirs may be compared. "inference" draws it from the prior.
        """
        check_choice("mode", mode, ("training", "inference"))
        if mode == "inference":
            return self.model(tokens).logits, None
        plans: list[Plan] = []

        def posterior(half: LowerOutput) -> Plan:
            plans.append(self.model.sample_posterior(half))
            return plans[0]

        return self.model(tokens, z=posterior).logits, plans[0].logits

    def generate(
        self,
        prompt_tokens: Int[Tensor, "B P"],
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Int[Tensor, "B S"]:
        """Prompts and their continuations, ``S = P + max_new_tokens``; temperature 0 takes the likeliest token.

        The seed is drawn from torch's global generator: after ``torch.manual_seed`` the result is the same again.

        Raises: ValueError if prompt and continuation exceed ``max_seq_len`` (the original drops the prompt's
            beginning), or a setting is out of range.
        """
        check(prompt_tokens.ndim == 2, "prompt_tokens", tuple(prompt_tokens.shape), "of shape (B, P)")
        seed = int(torch.randint(2**31, ()))
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
        new = generate(self.model, prompt_tokens.tolist(), settings)
        return torch.cat([prompt_tokens, prompt_tokens.new_tensor(new)], dim=1)


class TransformerBaseline(nn.Module):
    """``helmholtz.models.Transformer`` built from the original config; the model itself is ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.model = transformer.Transformer(config.to_baseline())

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "B T vocab"]:
        """Logits of the next tokens."""
        return self.model(tokens).logits


def _check_config(config: object) -> None:
    check(isinstance(config, ModelConfig), "config", config, f"a {ModelConfig.__module__} config")


def _check_length(name: str, length: int, longest: int) -> None:
    check(length <= longest, name, f"{length} tokens", f"at most max_seq_len = {longest} tokens long")


def _reshape_query(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """State dictionaries written when the query was a row."""
    name = f"{prefix}encoder.query"
    if name in state:
        state[name] = state[name].view(1, 1, -1)


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
