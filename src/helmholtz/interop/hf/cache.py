"""The state of a stream where transformers expects a cache of keys and values."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from helmholtz.layers.state import Room, map_state
from helmholtz.models.outputs import LMState

NOT_CROPPABLE = (
    "a state of helmholtz cannot be cut back to an earlier token (a recurrence forgets where it was): "
    "assisted decoding and prompt lookup need that and cannot be used"
)


class StateLayer(CacheLayerMixin):
    """All of a model's state as the one layer of a cache.

    Args:
        length: tokens that will be read at most, for which memory is allocated once; None if that is not known.
        encode_again: whether the encoder of a plan may read later tokens, as it does with labels.

    Attributes:
        mask: real tokens of what was read, ``B S``.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, length: int | None = None, *, encode_again: bool = True) -> None:
        super().__init__()
        self.length, self.encode_again, self._room = length, encode_again, Room()
        self._state: LMState | None = None
        self._read: Callable[[], LMState] | None = None
        self.mask: Tensor | None = None

    @property
    def state(self) -> LMState | None:
        """None before the first token."""
        if self._read is not None:
            self._state, self._read = self._read(), None
        return self._state

    @property
    def batch_size(self) -> int:
        return -1 if self.mask is None else len(self.mask)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("past_key_values: a StateCache holds states of helmholtz, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.lazy_initialization(key_states, value_states)

    def advance(self, state: LMState, real: Tensor) -> None:
        """Replace the state by the one after more tokens, of which ``real`` (``B T``) are no pads."""
        self._state, self._read = state, None
        before = real[:, :0] if self.mask is None else self.mask
        (self.mask,), self._room = self._room.append((before,), (real,), capacity=self.length)

    def defer(self, read: Callable[[], LMState], real: Tensor) -> None:
        """Be the state after the first tokens, which ``read`` reads when somebody asks for it."""
        self._read, self.mask = read, real

    def get_seq_length(self) -> int:
        """Tokens read, pads included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._state = self._read = self.mask = None
        self._room = Room()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row ``beam_idx[i]`` in row ``i``."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        raise ValueError("cache_implementation: a StateCache is not offloaded")

    def prefetch(self) -> None:
        self.offload()

    def activate_past_recording(self) -> None:
        raise ValueError(NOT_CROPPABLE)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(NOT_CROPPABLE)

    def _map(self, rows: Any) -> None:
        if self.state is not None:
            self._state, self.mask = map_state(rows, self.state), rows(self.mask)


class StateCache(Cache):
    """The cache of a ``HelmholtzForCausalLM``: reordered for beams and repeated like any other, never cropped.

    Changed in place by ``forward``, as transformers wants it; the states themselves are not, so ``state`` may be kept.

    Args:
        length: as of ``StateLayer``, as is the next; ``generate`` gives that of prompt and continuation, and False.
    """

    def __init__(self, length: int | None = None, *, encode_again: bool = True) -> None:
        self.layer = StateLayer(length, encode_again=encode_again)
        super().__init__(layers=[self.layer])

    @property
    def state(self) -> LMState | None:
        """What the model remembers; None before the first token."""
        return self.layer.state

    @property
    def mask(self) -> Tensor | None:
        """Real tokens of what was read, ``B S``."""
        return self.layer.mask

    def advance(self, state: LMState, real: Tensor) -> None:
        """As ``StateLayer.advance``."""
        self.layer.advance(state, real)

    def defer(self, read: Callable[[], LMState], real: Tensor) -> None:
        """As ``StateLayer.defer``."""
        self.layer.defer(read, real)
