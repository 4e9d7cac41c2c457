"""The ways in which transformers says which tokens are real and which belong together, as this library says it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helmholtz._checks import check, nearest
from helmholtz.models.decoder import Decoder, PlanOf
from helmholtz.models.outputs import LMOutput, LMState

PASSED_ON = (
    *("tokenizer", "assistant_tokenizer", "token_type_ids", "cache_position"),
    *("is_causal", "max_length_q", "max_length_k"),
)
"""What ``generate``, tokenizers and collators pass to every model although it says nothing to this one."""


def check_arguments(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises: ValueError for arguments of a call that nothing takes.

    Args:
        known: names of the arguments that are taken, for a hint.
    """
    causal = others.get("is_causal")
    check(causal is not False, "is_causal", causal, "true: a decoder reads no later tokens")
    for name, value in others.items():
        if name not in PASSED_ON and value is not None and value is not False:
            close = nearest(name, known)
            raise ValueError(f"{name}: a helmholtz model takes no such argument{close}, got {short(value)!r}")


def short(value: object) -> object:
    """The value, of a tensor its shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one call reads."""

    tokens: Tensor
    """Ids ``B T``; packed sequences of many rows lie end to end in one."""
    embeds: Tensor | None
    """Vectors in place of the tokens' embeddings."""
    mask: Tensor | None
    """Real tokens, bool ``B T``; None means all."""
    cu_seqlens: Tensor | None
    """Bounds of packed sequences; None means that each row is one."""
    rows: int
    """Rows that were given."""

    @classmethod
    def of(
        cls,
        tokens: Tensor | None,
        embeds: Tensor | None,
        *,
        mask: Tensor | None,
        position_ids: Tensor | None,
        bounds: Tensor | None,
        seq_idx: Tensor | None,
        past: Tensor | None,
        pad: int | None,
    ) -> "Inputs":
        """
        Args:
            mask: of the whole stream, of any dtype.
            position_ids: consecutive within a sequence. Where they are not, another sequence starts.
            bounds: of sequences packed in one row, integer ``n+1``.
            seq_idx: the sequence of each token, ``B T``, as ``DataCollatorWithFlattening`` says it.
            past: real tokens of the stream before, bool ``B S``.
            pad: an id outside the vocabulary that only pads have.

        Raises: ValueError for positions that the model would not give, except for sequences that start above 0, and
            for a mask that contradicts what was read before.
        """
        if (tokens is None) == (embeds is None):
            came = "neither" if tokens is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: wanted one of them, got {came}")
        if embeds is not None:
            tokens = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        assert tokens is not None
        real = _real_tokens(tokens, mask, past, pad)
        if pad is not None:
            tokens = tokens.masked_fill(tokens == pad, 0)
        if bounds is None and seq_idx is not None:
            wanted = f"of shape {tuple(tokens.shape)}"
            check(seq_idx.shape == tokens.shape, "seq_idx", tuple(seq_idx.shape), wanted)
            bounds = _starts_to_bounds(seq_idx.diff(dim=1, prepend=seq_idx[:, :1] - 1) != 0)
        elif bounds is None and position_ids is not None:
            bounds = _bounds(tokens, real, position_ids, past)
        if bounds is None:
            return cls(tokens, embeds, real, None, len(tokens))
        check(past is None, "past_key_values", "a stream", "None where sequences are packed")
        vectors = None if embeds is None else embeds.reshape(1, -1, embeds.shape[-1])
        return cls(tokens.reshape(1, -1), vectors, real, bounds, len(tokens))

    def read(self, model: Decoder, state: LMState | None, z: PlanOf | None) -> LMOutput:
        """The model's output, that of a stream if there is a state."""
        output: LMOutput = model(
            self.tokens, attention_mask=self.mask, cu_seqlens=self.cu_seqlens, state=state, z=z
        )
        return output

    def real(self) -> Tensor:
        """Real tokens, as a tensor also where all are."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    def as_given(self, x: Tensor) -> Tensor:
        """``B T ...`` of something that belongs to the tokens."""
        return x if self.cu_seqlens is None else x.reshape(self.rows, -1, *x.shape[2:])


def _real_tokens(tokens: Tensor, mask: Tensor | None, past: Tensor | None, pad: int | None) -> Tensor | None:
    """Which of these tokens are real; None if all are."""
    if mask is None:
        real = None if pad is None else tokens != pad
        return None if real is None or bool(real.all()) else real
    mask = mask != 0
    if past is None:
        return mask
    wanted = (len(tokens), past.shape[1] + tokens.shape[1])
    check(
        tuple(mask.shape) == wanted, "attention_mask", tuple(mask.shape), f"of shape {wanted}: the stream's"
    )
    same = torch.equal(mask[:, : past.shape[1]], past)
    check(same, "attention_mask", "another one", "the same as before for tokens that the cache has read")
    return mask[:, past.shape[1] :]


def _bounds(tokens: Tensor, mask: Tensor | None, positions: Tensor, past: Tensor | None) -> Tensor | None:
    """Bounds of packed sequences, None if each row is one."""
    wanted = f"of shape {tuple(tokens.shape)}"
    check(positions.shape[-1] == tokens.shape[1], "position_ids", tuple(positions.shape), wanted)
    positions = positions.expand_as(tokens)
    if mask is None and past is None:
        starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        if not bool(starts.any()):
            return None
        starts[:, 0] = True
        return _starts_to_bounds(starts)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    own = real.long().cumsum(1) - 1
    if past is not None:
        own = own + past.sum(1, keepdim=True)
    offset = (positions - own).masked_fill(~real, 0)
    first = offset.gather(1, real.long().argmax(1, keepdim=True)) if past is None else 0
    same = bool(((offset == first) | ~real).all())
    check(same, "position_ids", "others", "consecutive over the real tokens of a row with a mask or a cache")
    return None


def _starts_to_bounds(starts: Tensor) -> Tensor:
    places = starts.flatten().nonzero().flatten()
    return torch.cat([places, places.new_tensor([starts.numel()])])
