"""What all decoders share: the config, the way from tokens to logits, the stream, the checks of tokens."""

import abc
import contextlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import (
    check,
    check_choice,
    check_divides,
    check_fraction,
    check_integer,
    check_keys,
    check_positive,
)
from helmholtz.layers.base import AbstractMixer
from helmholtz.layers.block import Block
from helmholtz.layers.init import init_normal, scale_residual
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.placement import device_of
from helmholtz.layers.row_draws import number_dropouts
from helmholtz.layers.sequence import SequenceLayout, sequence_layout, zero_pads
from helmholtz.models.tied import keep_ties

ConfigT = TypeVar("ConfigT", bound="ModelConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder. Fields left None are filled in, so a saved config is complete."""

    vocab_size: int
    """Number of token ids."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    max_seq_len: int = 1024
    """Longest sequence, in real tokens."""
    tie_embeddings: bool = True
    """Whether the output matrix is the embedding. What is saved goes by the tensors: see ``models.tied``."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm."""
    dropout: float = 0.0
    """Probability to drop what a block writes into the residual stream."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "max_seq_len"):
            check_integer(name, getattr(self, name))
        check_positive("norm_eps", self.norm_eps)
        check_fraction("dropout", self.dropout)
        check(isinstance(self.tie_embeddings, bool), "tie_embeddings", self.tie_embeddings, "true or false")

    def _fill(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON; ``from_dict`` gives an equal config back."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The config with these values. Raises: ValueError for an unknown key, naming the nearest one."""
        return _from_dict(cls, values, cls.__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModelConfig(ModelConfig):
    """Sizes of a decoder whose blocks have heads, rotary positions and a feed-forward."""

    n_heads: int = 4
    """Query heads; a divisor of d_model."""
    n_kv_heads: int | None = None
    """Key/value heads, a divisor of n_heads; None means n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward; None means 8/3 d_model rounded up to a multiple of 8."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        self._fill("n_kv_heads", self.n_heads)
        check_divides("n_kv_heads", self.n_kv_heads or 0, "n_heads", self.n_heads)
        if self.d_ff is None:
            self._fill("d_ff", self._derived_d_ff())
        check_integer("d_ff", self.d_ff)
        check_positive("rope_theta", self.rope_theta)

    def _derived_d_ff(self) -> int:
        return -(-8 * self.d_model // 24) * 8


def _from_dict(cls: type, values: Any, name: str) -> Any:
    check(isinstance(values, Mapping), name, values, "a mapping of names to values")
    known = [f.name for f in fields(cls)]
    check_keys(name, values, known)
    hints = typing.get_type_hints(cls)
    built = {key: _value(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the field's type wants it: JSON knows neither nested configs nor tuples, nor which words exist."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    nested = [option for option in options if is_dataclass(option)]
    if nested:
        return _from_dict(typing.cast(type, nested[0]), value, name)
    if isinstance(value, list):
        items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple]
        return tuple(_value(items[0], item, name) for item in value) if items else value
    words = [w for option in options if typing.get_origin(option) is Literal for w in typing.get_args(option)]
    if words and isinstance(value, str):
        check_choice(name, value, words)
    return value


@dataclass(frozen=True, slots=True)
class LMState:
    """What a decoder remembers of a stream: a state per block, and the real tokens each row has seen."""

    blocks: tuple[Any, ...]
    position: Int[Tensor, "B"]


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Next-token logits, 0 at pads, and the state of the stream if there is one."""

    logits: Float[Tensor, "B T vocab"]
    state: LMState | None = None


class AbstractDecoder(nn.Module, abc.ABC):
    """Embedding, pre-norm blocks, norm, output matrix. Subclasses choose the config and build the mixers.

    Pads enter the residual stream as 0 and stay 0 through every block: neither their ids nor their number
    matter.
    """

    config_class: ClassVar[type[ModelConfig]]
    blocks: Sequence[Block[Any]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [self._block(config, layer) for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        init_normal(self.embed)
        init_normal(self.unembed)
        feed_forwards = [block.mlp for block in blocks if block.mlp is not None]
        scale_residual([b.mixer.o_proj for b in blocks] + [mlp.down_proj for mlp in feed_forwards])
        self.tie_weights()
        keep_ties(self)
        number_dropouts(self)

    @abc.abstractmethod
    def build_mixer(self, layer: int) -> AbstractMixer[Any]:
        """The mixer of block ``layer``, initialised; called once per block by the constructor."""

    def _block(self, config: ModelConfig, layer: int) -> Block[Any]:
        mlp = None
        if isinstance(config, AttentionModelConfig):
            assert config.d_ff is not None
            mlp = SwiGLU(config.d_model, config.d_ff)
        mixer = self.build_mixer(layer)
        return Block(mixer, mlp, config.d_model, norm_eps=config.norm_eps, dropout=config.dropout)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.unembed.weight = self.embed.weight

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        state: LMState | None = None,
    ) -> LMOutput:
        """Logits of the token after each position of ``tokens`` (integer ``B T``).

        Args:
            attention_mask: bool or integer ``B T``, non-zero where a token is real; any pattern.
            cu_seqlens: integer ``n+1``, bounds of sequences packed end to end in one row; excludes mask and state.
            state: the stream that the tokens continue, which stays unchanged; then the output holds the next state.

        Raises: ValueError for ids outside the vocabulary, a sequence beyond ``max_seq_len`` (which counts the tokens
            that the state has seen), or bad shapes.
        """
        x, layout = self._embed(tokens, attention_mask, cu_seqlens, state)
        x, states = self._run_blocks(x, layout, state)
        logits = self.unembed(self.norm(x))
        return LMOutput(logits, None if state is None else LMState(states, layout.advance(state.position)))

    def init_state(self, batch_size: int) -> LMState:
        """The state before the first token."""
        check_integer("batch_size", batch_size, minimum=0)
        position = torch.zeros(batch_size, dtype=torch.long, device=device_of(self))
        return LMState(tuple(block.init_state(batch_size) for block in self.blocks), position)

    def step(
        self,
        tokens: Shaped[Tensor, "..."],
        state: LMState,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
    ) -> LMOutput:
        """``forward`` with a state: logits after the next one or many tokens of a stream, and the new state."""
        output: LMOutput = self(tokens, attention_mask=attention_mask, state=state)
        return output

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
        for index in range(first, len(self.blocks) if last is None else last):
            before = None if state is None else state.blocks[index]
            x = self.blocks[index](x, layout=layout, state=before, source=source)
            source = None
            if before is not None:
                x, after = x
                states.append(after)
        return x, tuple(states)

    def _embed(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LMState | None,
    ) -> tuple[Float[Tensor, "B T D"], SequenceLayout]:
        _check_tokens(tokens)
        position = None if state is None else state.position
        if position is not None and len(position) != len(tokens):
            raise ValueError(f"tokens: {len(tokens)} rows came, the state is of a batch of {len(position)}")
        packed = state is not None and cu_seqlens is not None
        check(not packed, "cu_seqlens", cu_seqlens, "None with a state: its rows are one sequence each")
        layout = sequence_layout(tokens, attention_mask, cu_seqlens, position)
        self._check_length(layout, position)
        if layout.mask is not None:
            tokens = tokens.masked_fill(~layout.mask, 0)
        self._check_vocabulary(tokens)
        return zero_pads(self.embed(tokens), layout), layout

    def _check_length(self, layout: SequenceLayout, position: Tensor | None) -> None:
        if layout.cu_seqlens is not None:
            longest = int(layout.cu_seqlens.diff().max())
        elif layout.mask is None and position is None:
            longest = layout.positions.shape[-1]
        else:
            seen = layout.positions.new_zeros(len(layout.positions)) if position is None else position
            longest = max(layout.advance(seen.to(layout.positions.device)).tolist(), default=0)
        if longest > self.config.max_seq_len:
            raise ValueError(
                f"tokens: a sequence of {longest} tokens is longer than max_seq_len={self.config.max_seq_len}"
            )

    def _check_vocabulary(self, tokens: Tensor) -> None:
        if not tokens.numel():
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            outside, size = (low if low < 0 else high), self.config.vocab_size
            raise ValueError(f"tokens: id {outside} is not in the vocabulary of {size} ids (0 to {size - 1})")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens: wanted int32 or int64 ids, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens: wanted shape (B, T), got {tuple(tokens.shape)}")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside the block; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
