"""A Mamba decoder whose tokens come to rest: each at an equilibrium of its context, its past and a Hopfield memory.

Mamba-2 blocks read the sequence. From the normed stream ``c`` one more recurrence gives every token the coefficients of
an energy over ``z``: what the context asks for, how a step of the recurrence would answer to ``z``, and how near ``z``
is to stored patterns. The token's equilibrium is the point where the map ``f(z) = z - grad E(z)`` comes to rest; logits
are read from ``c``, the equilibrium and what the memory holds there (``docs/math/equilibrium.md``).

The public code of this idea is no guide: there energy and map were unrelated, one state served the whole sequence, and
no gradient reached the dynamics (``docs/design/005-mamba-hopfield.md``).
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar, final

from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer, EquilibriumState
from helmholtz.layers.equilibrium_config import EquilibriumConfig, EquilibriumSettings
from helmholtz.layers.hopfield import HopfieldMemory, WriteResult
from helmholtz.layers.mamba import MambaCell, MambaMixer
from helmholtz.layers.norm import RMSNorm
from helmholtz.models.base import AbstractDecoder, LMOutput, LMState, ModelConfig
from helmholtz.models.mamba import MambaConfig
from helmholtz.solvers import SolverConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaHopfieldConfig(EquilibriumSettings, MambaConfig):
    """Sizes of the Mamba blocks, the memory, and how equilibria are found and differentiated."""

    def __post_init__(self) -> None:
        MambaConfig.__post_init__(self)
        EquilibriumSettings.__post_init__(self)

    def equilibrium(self) -> EquilibriumConfig:
        """The config of the equilibrium layer."""
        return EquilibriumConfig(**{f.name: getattr(self, f.name) for f in fields(EquilibriumConfig)})


@dataclass(frozen=True, slots=True)
class MambaHopfieldState(LMState):
    """A stream's memory: block states, and the recurrence that feeds the energy."""

    equilibrium: EquilibriumState


@dataclass(frozen=True, slots=True)
class MambaHopfieldOutput(LMOutput):
    """Next-token logits, the state of the stream if there is one, and the equilibria they were read from."""

    equilibrium: Equilibrium = field(kw_only=True)


@final
class MambaHopfield(AbstractDecoder):
    """Decoder of Mamba-2 blocks with an equilibrium layer before the output matrix.

    Attributes:
        context_norm: makes the equilibrium layer's context of the blocks' stream.
        equilibrium: the layer; its ``dynamics`` and ``memory`` hold the parameters of the energy.
    """

    config_class: ClassVar[type[ModelConfig]] = MambaHopfieldConfig
    config: MambaHopfieldConfig

    def __init__(self, config: MambaHopfieldConfig) -> None:
        super().__init__(config)
        self.context_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.equilibrium = EquilibriumLayer(config.equilibrium())

    def build_mixer(self, layer: int) -> MambaMixer:
        c = self.config
        assert c.d_inner is not None
        return MambaMixer(c.d_model, d_inner=c.d_inner, d_state=c.d_state, d_conv=c.d_conv, d_head=c.d_head)

    @property
    def solver(self) -> SolverConfig:
        """How equilibria are found. Assigning another changes this model, not its config or checkpoints."""
        return self.equilibrium.solver

    @solver.setter
    def solver(self, solver: SolverConfig) -> None:
        self.equilibrium.solver = solver

    @property
    def memory(self) -> HopfieldMemory:
        """Learned patterns and writable slots."""
        return self.equilibrium.memory

    @property
    def memory_patterns(self) -> nn.Parameter:
        """The learned patterns, the only parameter with ``memory`` in its name."""
        return self.memory.memory_patterns

    def gradient_checkpointing_enable(self) -> None:
        """Recompute mixers and dynamics in the backward pass instead of keeping what it needs: slower, less memory."""
        self._checkpoint_gradients(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self._checkpoint_gradients(False)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, MambaMixer | MambaCell):
                module.gradient_checkpointing = enabled

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        state: LMState | None = None,
        z_init: Shaped[Tensor, "..."] | None = None,
    ) -> MambaHopfieldOutput:
        """Logits of the token after each position, and the equilibria.

        Args:
            state: as in ``AbstractDecoder.forward``.
            z_init: where the iterations start, ``B T D`` or ``B D``; None where the model would start. Changes
                equilibria within the tolerance only, except in the descent regime, where it selects among several. In a
                stream ``equilibrium.z[:, -1]`` of the step before is a warm start; ``generate`` starts where a whole
                pass does, which is nearer (``docs/design/005-mamba-hopfield.md``).

        Raises: ValueError as ``AbstractDecoder.forward``, and for a ``z_init`` of another shape or not finite.
        """
        assert state is None or isinstance(state, MambaHopfieldState)
        x, layout = self._embed(tokens, attention_mask, cu_seqlens, state)
        x, states = self._run_blocks(x, layout, state)
        before = None if state is None else state.equilibrium
        found = self.equilibrium(self.context_norm(x), layout, state=before, z_init=z_init)
        after = None
        if state is not None:
            found, dynamics = found
            after = MambaHopfieldState(states, layout.advance(state.position), dynamics)
        return MambaHopfieldOutput(self.unembed(self.norm(found.output)), after, equilibrium=found)

    def init_state(self, batch_size: int) -> MambaHopfieldState:
        state = super().init_state(batch_size)
        return MambaHopfieldState(state.blocks, state.position, self.equilibrium.init_state(batch_size))

    def step(
        self,
        tokens: Shaped[Tensor, "..."],
        state: LMState,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        z_init: Shaped[Tensor, "..."] | None = None,
    ) -> MambaHopfieldOutput:
        """``forward`` with a state: logits and equilibria of the next tokens of a stream, and the new state."""
        output: MambaHopfieldOutput = self(tokens, attention_mask=attention_mask, state=state, z_init=z_init)
        return output

    def write_memory(
        self, equilibrium: Equilibrium, mask: Bool[Tensor, "B T"] | None = None, *, in_eval: bool = False
    ) -> WriteResult:
        """Store the equilibria of a call in the memory's slots, detached; between calls, never within one.

        Pads and tokens that have not converged are not stored.

        Args:
            mask: tokens to store; None means all.
            in_eval: allow it in evaluation mode, in which the memory does not change by accident.

        Returns: what became of the rows; those that are not novel are dropped or merged.
        Raises: ValueError without slots, and in evaluation mode without ``in_eval``.
        """
        chosen = equilibrium.solution.converged
        if mask is not None:
            chosen = chosen & equilibrium.rows(mask)
        return self.memory.write(equilibrium.rows(equilibrium.z), chosen, in_eval=in_eval, warn=False)


def small(vocab_size: int) -> MambaHopfieldConfig:
    """Beside ``transformer.small``: 4 blocks of width 128, 256 patterns."""
    return MambaHopfieldConfig(
        vocab_size=vocab_size, d_model=128, n_layers=4, d_head=32, n_patterns=256, max_seq_len=256
    )


def medium(vocab_size: int) -> MambaHopfieldConfig:
    """6 blocks of width 512, 5,000 patterns: the size of the original's README."""
    return MambaHopfieldConfig(
        vocab_size=vocab_size, d_model=512, d_state=64, n_layers=6, n_patterns=5000, max_seq_len=1024
    )
