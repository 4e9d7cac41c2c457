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
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.layers.attention import Attention, check_heads
from helmholtz.layers.block import Block
from helmholtz.layers.latent import (
    BitsPostSampler,
    LatentEncoder,
    Plan,
    TablePostSampler,
    sample_code,
    sample_plan,
)
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.placement import device_of
from helmholtz.layers.row_draws import number_dropouts
from helmholtz.layers.sequence import SequenceLayout, sequence_layout
from helmholtz.layers.state import KVCache
from helmholtz.models.base import AbstractDecoder, AttentionModelConfig, LMOutput, LMState, ModelConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.ops.binary_latent import MAX_LATENT_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeTransformerConfig(AttentionModelConfig):
    """Sizes of a Free Transformer: those of the decoder and those of the plan."""

    n_latent_bits: int = 8
    """Bits of the plan per token, 1 to 16 (the paper: 16). A table holds 2**n_latent_bits vectors."""
    split_layer: int | None = None
    """Blocks below the plan, 1 to n_layers - 1; None means half of them, rounded down."""
    post_sampler: Literal["table", "bits"] = "table"
    """A vector per code (the paper), or the sum of a vector per bit."""

    def __post_init__(self) -> None:
        AttentionModelConfig.__post_init__(self)
        assert self.n_kv_heads is not None
        check_heads(self.d_model, self.n_heads, self.n_kv_heads)
        check_integer("n_layers", self.n_layers, minimum=2)
        check_integer("n_latent_bits", self.n_latent_bits)
        check(self.n_latent_bits <= MAX_LATENT_BITS, "n_latent_bits", self.n_latent_bits, "in 1..16")
        self._fill("split_layer", self.n_layers // 2)
        check_integer("split_layer", self.split_layer)
        assert self.split_layer is not None
        below = f"at most n_layers - 1 = {self.n_layers - 1}: a block above reads the plan"
        check(self.split_layer < self.n_layers, "split_layer", self.split_layer, below)
        check_choice("post_sampler", self.post_sampler, ("table", "bits"))


@dataclass(frozen=True, slots=True)
class PlannedState(LMState):
    """A stream's memory: block states, and of every token so far its code and what the encoder would read of it."""

    code: Int[Tensor, "B S"]
    hidden: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"] | None
    """Real tokens; None while all are."""


@dataclass(frozen=True, slots=True)
class Halfway:
    """Tokens after the lower half of the model, on their own or as the next ones of a stream."""

    x: Float[Tensor, "B T D"]
    layout: SequenceLayout
    before: PlannedState | None
    """The stream before these tokens."""
    lower_states: tuple[KVCache, ...] = ()
    """Its lower blocks after them."""


@final
class FreeTransformer(AbstractDecoder):
    """Decoder with a latent plan, in three stages: ``lower`` to the middle, ``posterior``, ``upper`` given a plan.

    ``upper(lower(tokens), plan)`` is causal for a given plan: neither later tokens nor later codes matter.
    """

    config_class: ClassVar[type[ModelConfig]] = FreeTransformerConfig
    config: FreeTransformerConfig

    def __init__(self, config: FreeTransformerConfig) -> None:
        super().__init__(config)
        c, bits = config, config.n_latent_bits
        self.encoder = LatentEncoder(self._encoder_block(), c.d_model, bits, norm_eps=c.norm_eps)
        table = c.post_sampler == "table"
        self.post_sampler = (TablePostSampler if table else BitsPostSampler)(bits, c.d_model)
        number_dropouts(self)

    @property
    def split_layer(self) -> int:
        """Index of the block that the plan enters: the number of blocks below it."""
        assert self.config.split_layer is not None
        return self.config.split_layer

    def build_mixer(self, layer: int) -> Attention:
        return self._attention(causal=True)

    def _attention(self, *, causal: bool) -> Attention:
        c = self.config
        return Attention(
            c.d_model, c.n_heads, n_kv_heads=c.n_kv_heads, rope_theta=c.rope_theta, causal=causal
        )

    def _encoder_block(self) -> Block[KVCache]:
        c = self.config
        assert c.d_ff is not None
        mlp = SwiGLU(c.d_model, c.d_ff)
        return Block(self._attention(causal=False), mlp, c.d_model, norm_eps=c.norm_eps, dropout=c.dropout)

    def lower(
        self,
        tokens: Shaped[Tensor, "..."],
        state: PlannedState | None = None,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> Halfway:
        """The blocks below the plan.

        Args:
            state: the stream that the tokens continue; then ``upper`` gives the next state.

        Raises: ValueError as ``forward``.
        """
        x, layout = self._embed(tokens, attention_mask, cu_seqlens, state)
        x, states = self._run_blocks(x, layout, state, last=self.split_layer)
        return Halfway(x, layout, state, states)

    def posterior(self, half: Halfway) -> Float[Tensor, "B T H"]:
        """Bit logits of these tokens' codes, read from them and all tokens of the stream before; 0 at pads.

        Not causal: a token's logits depend on the tokens after it. Codes that earlier tokens have stay as they are.
        """
        before = half.before
        if before is None or not before.hidden.shape[1]:
            return self.encoder(half.x, half.layout)
        context = torch.cat([before.hidden.to(half.x), half.x], dim=1)
        mask = _joined_mask(before, half)
        return self.encoder(context, sequence_layout(context, mask))[:, before.hidden.shape[1] :]

    def upper(self, half: Halfway, z: Plan) -> LMOutput:
        """Logits of the next tokens under a plan, and the state after them if they continue a stream.

        Raises: ValueError if the plan has another shape than the tokens, or a code is not in ``[0, 2**H)``.
        """
        self._check_plan(z, half)
        return self._upper(half, z)

    def _upper(self, half: Halfway, z: Plan) -> LMOutput:
        x, state = self.upper_blocks(half, z)
        return LMOutput(self.unembed(self.norm(x)), state)

    def upper_blocks(self, half: Halfway, z: Plan) -> tuple[Float[Tensor, "B T D"], PlannedState | None]:
        """``upper`` without the last norm and the output matrix; the plan is not checked."""
        before, source = half.before, half.x + self.post_sampler(z)
        x, states = self._run_blocks(half.x, half.layout, before, first=self.split_layer, source=source)
        if before is None:
            return x, None
        return x, PlannedState(
            blocks=(*half.lower_states, *states),
            position=half.layout.advance(before.position),
            code=torch.cat([before.code.to(z.code.device), z.code], dim=1),
            hidden=torch.cat([before.hidden.to(half.x), half.x], dim=1),
            mask=_joined_mask(before, half),
        )

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        *,
        z: Plan | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        state: LMState | None = None,
    ) -> LMOutput:
        """Logits of the token after each position, under the plan ``z``.

        Args:
            z: None draws one from the prior (torch's global generator), as in generation; so the cross-entropy of
                these logits bounds the model's own from above. ``encode`` gives the posterior's.
            state: as in ``AbstractDecoder.forward``. The encoder does not run; to read a prompt with it:
                ``half = lower(prompt, state)``, a plan from ``posterior(half)``, ``upper(half, plan)``.

        Raises: ValueError as ``AbstractDecoder.forward``, and as ``upper`` for the plan.
        """
        assert state is None or isinstance(state, PlannedState)
        half = self.lower(tokens, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        if z is None:
            return self._upper(half, self.sample_prior(*half.x.shape[:2], device=half.x.device))
        return self.upper(half, z)

    def init_state(self, batch_size: int) -> PlannedState:
        state = super().init_state(batch_size)
        return PlannedState(
            blocks=state.blocks,
            position=state.position,
            code=state.position.new_zeros(batch_size, 0),
            hidden=torch.zeros(batch_size, 0, self.config.d_model, device=state.position.device),
            mask=None,
        )

    def step(
        self,
        tokens: Shaped[Tensor, "..."],
        state: LMState,
        *,
        z: Plan | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
    ) -> LMOutput:
        """``forward`` with a state; the tokens' codes are ``z`` or, if None, drawn from the prior."""
        output: LMOutput = self(tokens, z=z, attention_mask=attention_mask, state=state)
        return output

    def encode(
        self,
        tokens: Shaped[Tensor, "..."],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """A plan of the text drawn from the posterior, and the bit logits it was drawn from."""
        half = self.lower(tokens, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        return self.sample_posterior(half, generator=generator)

    def sample_posterior(self, half: Halfway, *, generator: torch.Generator | None = None) -> Plan:
        """A plan drawn from ``posterior(half)``; None draws as ``sample_plan`` does."""
        return sample_plan(self.posterior(half), generator=generator)

    def sample_prior(
        self,
        batch_size: int,
        n_tokens: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Plan:
        """Uniform codes, one per token, where the model is or on ``device``; None draws as ``sample_plan`` does."""
        n_bits, device = self.config.n_latent_bits, device or device_of(self)
        return Plan(sample_code(n_bits, batch_size, n_tokens, device=device, generator=generator))

    def _check_plan(self, z: Plan, half: Halfway) -> None:
        shape, codes = tuple(half.x.shape[:2]), 2**self.config.n_latent_bits
        check(tuple(z.code.shape) == shape, "z.code", tuple(z.code.shape), f"of shape {shape} as the tokens")
        integer = not (z.code.is_floating_point() or z.code.is_complex() or z.code.dtype == torch.bool)
        check(integer, "z.code", z.code.dtype, "of an integer dtype")
        if z.code.numel():
            low, high = (int(bound) for bound in z.code.aminmax())
            check(low >= 0 and high < codes, "z.code", f"values from {low} to {high}", f"in [0, {codes})")
        if z.logits is not None:
            wanted = (*shape, self.config.n_latent_bits)
            check(tuple(z.logits.shape) == wanted, "z.logits", tuple(z.logits.shape), f"of shape {wanted}")


def _joined_mask(before: PlannedState, half: Halfway) -> Bool[Tensor, "B S"] | None:
    if before.mask is None and half.layout.mask is None:
        return None
    parts = [(before.mask, before.hidden), (half.layout.mask, half.x)]
    masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for mask, x in parts]
    return torch.cat(masks, dim=1)


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
        wanted = _parameters(FreeTransformer(config))
        found = _parameters(Transformer(TransformerConfig(**sizes)))
    d_ff = config.d_ff + round((wanted - found) / (3 * config.d_model * sizes["n_layers"]))
    limit = f"at most twice the model's {config.d_ff}, for a control of {wanted:,} parameters"
    check(0 < d_ff <= 2 * config.d_ff, "d_ff", d_ff, limit)
    return TransformerConfig(**sizes | {"d_ff": d_ff})


def _parameters(model: AbstractDecoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small(vocab_size: int) -> FreeTransformerConfig:
    """The sizes of ``transformer.small`` with a plan of 8 bits per token."""
    return FreeTransformerConfig(
        vocab_size=vocab_size, d_model=128, n_layers=4, n_heads=4, max_seq_len=256, n_latent_bits=8
    )
