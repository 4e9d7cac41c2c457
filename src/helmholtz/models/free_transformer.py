"""The Free Transformer: a Llama-style decoder with a latent plan, trained as a conditional variational autoencoder.

The lower half of the decoder reads the tokens. In training and over a prompt, an encoder block without a causal mask
reads the lower half's result into a code of ``H`` bits per token; where text is generated, each token's code is drawn
uniformly instead. A table turns the codes into vectors, which are added to the keys and values of the middle block,
and to nothing else. With a table of zeros the model is the baseline decoder of the same weights.

Differences from the paper (Fleuret, "The Free Transformer", 2025) are choices where it is silent: keys and values see
``norm(x + r)`` (a pre-norm block with ``x + r`` as its source), the encoder has rotary positions (without any, all
tokens get the same logits), the readout has no bias, and the depth of the plan is an option.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, final

import torch

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.layers.latent import BitsPostSampler, LatentEncoder, TablePostSampler
from helmholtz.layers.sizing import count_parameters, matched_size
from helmholtz.models.base import AttentionModelConfig, ModelConfig, PlanConfig
from helmholtz.models.decoder import Decoder
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.ops.binary_latent import MAX_LATENT_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeTransformerConfig(AttentionModelConfig):
    """Sizes of a Free Transformer's decoder and of its plan."""

    n_latent_bits: int = 8
    """Bits of the plan per token, 1 to 16 (the paper: 16). A table holds 2**n_latent_bits vectors."""
    split_layer: int | None = None
    """Number of blocks below the plan, 1 to n_layers - 1; None means half of them, rounded down."""
    post_sampler: Literal["table", "bits"] = "table"
    """A vector per code (the paper), or the sum of a vector per bit."""

    def __post_init__(self) -> None:
        AttentionModelConfig.__post_init__(self)
        check_integer("n_layers", self.n_layers, minimum=2)
        check_integer("n_latent_bits", self.n_latent_bits)
        check(self.n_latent_bits <= MAX_LATENT_BITS, "n_latent_bits", self.n_latent_bits, "in 1..16")
        self._fill("split_layer", self.n_layers // 2)
        check_integer("split_layer", self.split_layer)
        assert self.split_layer is not None
        below = f"at most n_layers - 1 = {self.n_layers - 1}: a block above reads the plan"
        check(self.split_layer < self.n_layers, "split_layer", self.split_layer, below)
        check_choice("post_sampler", self.post_sampler, ("table", "bits"))

    def plan_config(self) -> PlanConfig:
        assert self.split_layer is not None
        return PlanConfig(
            layer=self.split_layer,
            n_bits=self.n_latent_bits,
            post_sampler=self.post_sampler,
            encoder=self._attention_layer(causal=False),
        )


@final
class FreeTransformer(Decoder):
    """Decoder of softmax attention blocks with a latent plan (Fleuret, "The Free Transformer", 2025)."""

    config_class: ClassVar[type[ModelConfig]] = FreeTransformerConfig
    config: FreeTransformerConfig
    plan: PlanConfig
    encoder: LatentEncoder
    post_sampler: TablePostSampler | BitsPostSampler


def control(config: FreeTransformerConfig, *, extra_layers: int = 1) -> TransformerConfig:
    """The decoder without a plan that has the parameters of a Free Transformer.

    The encoder block's go into ``extra_layers`` more blocks (1: the control of the comparison; 0: the baseline's
    depth), the rest, table included, into the feed-forward width of all blocks.

    Raises: ValueError if the feed-forward would have to be more than twice as wide: a table of many codes dwarfs a
        narrow model. Then take fewer bits or ``post_sampler="bits"``.
    """
    assert config.d_ff is not None
    names = {field.name for field in fields(TransformerConfig)}
    sizes = {name: getattr(config, name) for name in names} | {"n_layers": config.n_layers + extra_layers}
    with torch.device("meta"):
        wanted = count_parameters(FreeTransformer(config))
    d_ff = matched_size(lambda d_ff: Transformer(TransformerConfig(**sizes | {"d_ff": d_ff})), wanted)
    limit = f"at most twice the model's {config.d_ff}, for a control of {wanted:,} parameters"
    check(d_ff <= 2 * config.d_ff, "d_ff", d_ff, limit)
    return TransformerConfig(**sizes | {"d_ff": d_ff})


def small(vocab_size: int) -> FreeTransformerConfig:
    """The sizes of ``transformer.small`` with a plan of 8 bits per token."""
    return FreeTransformerConfig(
        vocab_size=vocab_size, d_model=128, n_layers=4, n_heads=4, max_seq_len=256, n_latent_bits=8
    )
