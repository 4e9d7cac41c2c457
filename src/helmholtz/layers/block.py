"""One layer of a decoder: a mixer and mostly a feed-forward, each behind a norm and around a residual."""

from typing import Generic

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz.layers.base import AbstractMixer, StateT
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.norm import RMSNorm
from helmholtz.layers.row_draws import RowDropout
from helmholtz.layers.sequence import SequenceLayout


class Block(nn.Module, Generic[StateT]):
    """Pre-norm residual block: ``h = x + mixer(norm(x))``, ``y = h + mlp(norm(h))``; ``y = h`` without an ``mlp``.

    Dropout acts on what the two branches write, never inside a mixer: a prior with dropped weights is no
    distribution. A pad that comes in as 0 goes out as 0.

    Source: Touvron et al., "LLaMA", 2023, section 2.2; Zhang & Sennrich, "RMSNorm", 2019.
    """

    def __init__(
        self,
        mixer: AbstractMixer[StateT],
        mlp: SwiGLU | None,
        d_model: int,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = None if mlp is None else RMSNorm(d_model, eps=norm_eps)
        self.mlp = mlp
        self.mixer_dropout = RowDropout(dropout)
        self.mlp_dropout = RowDropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "#B #T D"],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        layout: SequenceLayout | None = None,
        state: StateT | None = None,
        source: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"] | tuple[Float[Tensor, "B T D"], StateT]:
        """The arguments and results of ``AbstractMixer.forward``; a ``source`` passes the norm as ``x`` does."""
        norm = self.mixer_norm  # read once: a module finds its parts slowly
        source = None if source is None else norm(source)
        mixed = self.mixer(
            norm(x),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            layout=layout,
            state=state,
            source=source,
        )
        if state is None:
            return self._feed_forward(x + self.mixer_dropout(mixed))
        mixed, state = mixed
        return self._feed_forward(x + self.mixer_dropout(mixed)), state

    @property
    def writers(self) -> list[nn.Linear]:
        """The projections that write into the residual stream."""
        return [self.mixer.o_proj, *([] if self.mlp is None else [self.mlp.down_proj])]

    def init_state(self, batch_size: int) -> StateT:
        return self.mixer.init_state(batch_size)

    def _feed_forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        mlp, norm = self.mlp, self.mlp_norm
        return x if mlp is None or norm is None else x + self.mlp_dropout(mlp(norm(x)))
