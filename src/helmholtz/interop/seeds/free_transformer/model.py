"""The model and its parts in the original names, on the library's own."""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_choice
from helmholtz.interop.seeds.free_transformer.config import ModelConfig
from helmholtz.layers import mlp
from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.models import free_transformer
from helmholtz.models.generation import SamplingSettings, generate
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


class FreeTransformer(nn.Module):
    """``helmholtz.models.FreeTransformer`` built from the original config; the model itself is ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(isinstance(config, ModelConfig), "config", config, f"a {ModelConfig.__module__} config")
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
        half = self.model.lower(tokens)
        plan = self.model.sample_posterior(half)
        return self.model.upper(half, plan).logits, plan.logits

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


def _check_length(name: str, length: int, longest: int) -> None:
    check(length <= longest, name, f"{length} tokens", f"at most max_seq_len = {longest} tokens long")
