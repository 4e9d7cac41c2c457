"""The modules of a decoder, and how tokens go through them."""

import abc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.block import Block
from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer
from helmholtz.layers.init import init_normal, initializer_range, scale_residual
from helmholtz.layers.latent import BitsPostSampler, LatentEncoder, TablePostSampler
from helmholtz.layers.mixer_config import build_mixer
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.placement import device_of
from helmholtz.layers.row_draws import number_dropouts
from helmholtz.layers.sequence import SequenceLayout, sequence_layout, zero_pads
from helmholtz.layers.state import map_state
from helmholtz.models.base import ModelConfig, PlanConfig
from helmholtz.models.outputs import LMLoss, LMOutput, LMState, PlanState
from helmholtz.models.tied import keep_ties
from helmholtz.models.token_checks import check_length, check_tokens, check_vocabulary
from helmholtz.ops.losses import head_cross_entropy

LOGITS_BYTES = 2**30


class AbstractStack(nn.Module, abc.ABC):
    """What a config asks for, built in an order that seeds and checkpoints rely on; ``Decoder`` has the calls.

    Attributes:
        logits_bytes: if the logits of a call, in float32, are larger, a loss is made of them piece by piece. Assigning
            another number changes memory and rounding, and neither the config nor checkpoints.
    """

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig
    plan: PlanConfig | None
    blocks: Sequence[Block[Any]]
    encoder: LatentEncoder | None
    post_sampler: TablePostSampler | BitsPostSampler | None
    context_norm: RMSNorm | None
    equilibrium: EquilibriumLayer | None
    logits_bytes: int = LOGITS_BYTES

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = self.config_class
        check(isinstance(config, kind), "config", type(config).__name__, f"a {kind.__name__}")
        self.config, self.plan, self._layers = config, config.plan_config(), config.layer_configs()
        with initializer_range(config.initializer_range):
            self._build(config)
        number_dropouts(self)

    def _build(self, config: ModelConfig) -> None:
        # whatever draws random numbers stays in this order, or seeds give other models
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [
            self._block(layer.d_ff, partial(self.build_mixer, i)) for i, layer in enumerate(self._layers)
        ]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        for index, block in enumerate(blocks):
            check(
                block.mixer.causal,
                f"layers[{index}].mixer.causal",
                False,
                "true: it lets no token see a later one",
            )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        init_normal(self.embed)
        init_normal(self.unembed)
        scale_residual([writer for block in blocks for writer in block.writers])
        self.tie_weights()
        keep_ties(self)
        self._add_plan(self.plan)
        self._add_equilibrium()

    def build_mixer(self, layer: int) -> AbstractMixer[Any]:
        """The mixer of block ``layer``, initialised; called once per block by the constructor."""
        return build_mixer(self._layers[layer].mixer)

    def _block(self, d_ff: int | None, mixer: Callable[[], AbstractMixer[Any]]) -> Block[Any]:
        c = self.config
        mlp = None if d_ff is None else SwiGLU(c.d_model, d_ff)
        return Block(mixer(), mlp, c.d_model, norm_eps=c.norm_eps, dropout=c.dropout)

    def _add_plan(self, plan: PlanConfig | None) -> None:
        self.encoder = self.post_sampler = None
        if plan is None:
            return
        assert plan.encoder is not None
        block = self._block(plan.encoder.d_ff, partial(build_mixer, plan.encoder.mixer))
        self.encoder = LatentEncoder(block, self.config.d_model, plan.n_bits, norm_eps=self.config.norm_eps)
        table = plan.post_sampler == "table"
        self.post_sampler = (TablePostSampler if table else BitsPostSampler)(plan.n_bits, self.config.d_model)

    def _add_equilibrium(self) -> None:
        self.context_norm = self.equilibrium = None
        config = self.config.equilibrium_config()
        if config is not None:
            self.context_norm = RMSNorm(self.config.d_model, eps=self.config.norm_eps)
            self.equilibrium = EquilibriumLayer(config)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.unembed.weight = self.embed.weight

    @abc.abstractmethod
    def forward(self, tokens: Shaped[Tensor, "..."]) -> LMOutput | LMLoss:
        """Logits of the token after each position."""

    def init_state(self, batch_size: int, *, length: int | None = None, encode_again: bool = True) -> LMState:
        """The state before the first token.

        Args:
            length: tokens that the stream will have at most, pads included, for which caches are allocated once. A
                longer one, and None, allocate more where they are full, twice as much each time.
            encode_again: of a model with a plan, keep a vector per token, which ``posterior`` needs for a prompt that
                is read in parts and for a later one. Without it the encoder reads the first tokens alone.
        """
        check_integer("batch_size", batch_size, minimum=0)
        if length is not None:
            check_integer("length", length)
        position = torch.zeros(batch_size, dtype=torch.long, device=device_of(self))
        plan = None
        if self.plan is not None:
            hidden = torch.zeros(batch_size, 0, self.config.d_model, device=position.device)
            plan = PlanState(position.new_zeros(batch_size, 0), hidden if encode_again else None, mask=None)
        blocks = tuple(_starting_at(position, block.init_state(batch_size)) for block in self.blocks)
        dynamics = None if self.equilibrium is None else self.equilibrium.init_state(batch_size)
        return LMState(blocks, position, plan, dynamics, length=length)

    def _embed(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LMState | None,
    ) -> tuple[Float[Tensor, "B T D"], SequenceLayout]:
        check_tokens(tokens)
        position = None if state is None else self._position(state)
        if position is not None and len(position) != len(tokens):
            raise ValueError(f"tokens: {len(tokens)} rows came, the state is of a batch of {len(position)}")
        if state is not None and cu_seqlens is not None:
            check(False, "cu_seqlens", cu_seqlens, "None with a state: its rows are one sequence each")
        n_read, length = tokens.shape[1], None
        if state is not None:
            n_read, length = n_read + state.n_read, state.length
        layout = sequence_layout(tokens, attention_mask, cu_seqlens, position, length)
        if n_read > self.config.max_seq_len:  # pads and packed sequences do not count: look at what was read
            check_length(layout, position, self.config.max_seq_len)
        if layout.mask is not None:
            tokens = tokens.masked_fill(~layout.mask, 0)
        check_vocabulary(tokens, self.config.vocab_size)
        return zero_pads(self.embed(tokens), layout), layout

    def _position(self, state: LMState) -> Tensor:
        known, got = len(self.blocks), len(state.blocks)
        if got != known:
            check(False, "state.blocks", got, f"{known}, one per block")
        for name, mine, theirs in (
            ("plan", self.plan, state.plan),
            ("equilibrium", self.equilibrium, state.equilibrium),
        ):
            if (mine is None) != (theirs is None):
                wanted = f"{mine is not None}, as in the model that the stream is of"
                check(False, f"state.{name}", theirs is not None, wanted)
        return state.position

    def _run_blocks(
        self,
        x: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        state: LMState | None,
        first: int = 0,
        last: int | None = None,
        source: Float[Tensor, "B T D"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], tuple[Any, ...]]:
        """Blocks ``first`` to ``last``, the first of them with ``source``; their states after the call, if any came."""
        states = []
        for index, block in enumerate(list(self.blocks)[first:last], first):
            before = None if state is None else state.blocks[index]
            x = block(x, layout=layout, state=before, source=source)
            source = None
            if before is not None:
                x, after = x
                states.append(after)
        return x, tuple(states)

    def _settle(
        self,
        x: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        before: LMState | None,
        states: tuple[Any, ...],
        plan: PlanState | None,
        z_init: Tensor | None,
    ) -> tuple[Float[Tensor, "B T D"], LMState | None, Equilibrium | None]:
        """The equilibrium of what the blocks gave, if the model has one, and the state after the call, if one came."""
        found = dynamics = None
        if self.equilibrium is not None:
            assert self.context_norm is not None
            past = None if before is None else before.equilibrium
            found = self.equilibrium(self.context_norm(x), layout, state=past, z_init=z_init)
            if before is not None:
                found, dynamics = found
            x = found.output
        if before is None:
            return x, None, found
        n_read = before.n_read + x.shape[1]
        position = layout.advance(before.position)
        return x, LMState(states, position, plan, dynamics, n_read, before.length), found

    def _read_out(
        self, x: Float[Tensor, "B T D"], state: LMState | None, found: Equilibrium | None
    ) -> LMOutput:
        return LMOutput(self.unembed(self.norm(x)), state, found)

    def _loss_of(
        self,
        x: Float[Tensor, "B T D"],
        state: LMState | None,
        found: Equilibrium | None,
        targets: Int[Tensor, "B T"],
    ) -> LMLoss:
        most = max(1, self.logits_bytes // (4 * self.config.vocab_size))
        return LMLoss(head_cross_entropy(self.unembed, self.norm(x), targets, most_tokens=most), state, found)


def _starting_at(position: Tensor, state: Any) -> Any:
    """A block's state before the first token, with that very tensor for its position: a step counts once for all."""
    own = state.position
    return map_state(lambda x: position if x is own else x, state)
