"""The ways in which transformers says which tokens are real and which belong together, as this library says it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from helmholtz._checks import check
from helmholtz.models.decoder import Decoder
from helmholtz.models.outputs import LMOutput, LMState


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
        tokens: Tensor,
        embeds: Tensor | None,
        mask: Tensor | None,
        bounds: Tensor | None,
        position_ids: Tensor | None,
        past: Tensor | None,
    ) -> "Inputs":
        """
        Args:
            bounds: of sequences packed in one row, integer ``n+1``.
            position_ids: consecutive within a sequence. Where they are not, another sequence starts.
            past: real tokens of the stream before, bool ``B S``.

        Raises: ValueError for positions that the model would not give, except for sequences that start above 0.
        """
        if bounds is None and position_ids is not None:
            bounds = _bounds(tokens, mask, position_ids, past)
        if bounds is None:
            return cls(tokens, embeds, mask, None, len(tokens))
        check(past is None, "past_key_values", "a stream", "None where sequences are packed")
        vectors = None if embeds is None else embeds.reshape(1, -1, embeds.shape[-1])
        return cls(tokens.reshape(1, -1), vectors, mask, bounds, len(tokens))

    def masks(self) -> dict[str, Tensor | None]:
        """As the models take them."""
        return {"attention_mask": self.mask, "cu_seqlens": self.cu_seqlens}

    def read(self, model: Decoder, state: LMState | None) -> LMOutput:
        """The model's output, that of a stream if there is a state."""
        if state is None:
            return model(self.tokens, **self.masks())
        return model.step(self.tokens, state, attention_mask=self.mask)

    def real(self) -> Tensor:
        """Real tokens, as a tensor also where all are."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    def as_given(self, x: Tensor) -> Tensor:
        """``B T ...`` of something that belongs to the tokens."""
        return x if self.cu_seqlens is None else x.reshape(self.rows, -1, *x.shape[2:])


def real_tokens(tokens: Tensor, mask: Tensor | None, past: Tensor | None, pad: int | None) -> Tensor | None:
    """Which of these tokens are real, from a mask of the whole stream, of any dtype; None if all are.

    Args:
        pad: an id outside the vocabulary that only pads have.

    Raises: ValueError if the mask contradicts what was read before.
    """
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


def bounds_of(tokens: Tensor, bounds: Tensor | None, index: Tensor | None) -> Tensor | None:
    """``bounds``, or those of the index ``seq_idx`` of ``DataCollatorWithFlattening``, ``B T``."""
    if bounds is not None or index is None:
        return bounds
    check(index.shape == tokens.shape, "seq_idx", tuple(index.shape), f"of shape {tuple(tokens.shape)}")
    return _starts_to_bounds(index.diff(dim=1, prepend=index[:, :1] - 1) != 0)


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
