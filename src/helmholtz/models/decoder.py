"""The decoder: embedding, blocks of any mixers, and if wanted a latent plan and an equilibrium of every token."""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer
from helmholtz.layers.hopfield import HopfieldMemory, WriteResult
from helmholtz.layers.latent import Plan, check_plan, sample_code, sample_plan
from helmholtz.layers.placement import device_of
from helmholtz.layers.sequence import SequenceLayout, sequence_layout
from helmholtz.layers.state import both_masks
from helmholtz.models.base import ModelConfig, PlanConfig
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.models.outputs import LMLoss, LMOutput, LMState, LowerOutput
from helmholtz.models.stack import AbstractStack
from helmholtz.models.token_checks import check_targets
from helmholtz.solvers import SolverConfig

PlanOf = Callable[[LowerOutput], Plan]
"""Makes the plan of what the blocks below it give."""


class Decoder(AbstractStack):
    """Embedding, pre-norm blocks, norm, output matrix; with a plan and an equilibrium if the config has them.

    Pads enter the residual stream as 0 and stay 0 through every block: neither their ids nor their number matter.

    With a plan a forward pass has three stages: ``lower`` up to the block that the plan enters, ``posterior``, and
    ``upper`` given a plan. ``upper(lower(tokens), plan)`` is causal for a given plan: neither later tokens nor later
    codes matter. What needs a plan or an equilibrium raises ValueError of a model without.

    Attributes:
        plan: the config of the plan; None of a model without.
        encoder: reads bit logits from the text. With ``post_sampler`` it is the plan.
        post_sampler: makes vectors of codes. The sum of stream and vectors is the ``source`` of block ``plan.layer``.
        context_norm: makes the equilibrium layer's context of the blocks' stream.
        equilibrium: the layer, whose output replaces the stream; its ``dynamics`` and ``memory`` hold the parameters
            of the energy. None of a model without.
    """

    config_class: ClassVar[type[ModelConfig]] = DecoderConfig

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
        state: LMState | None = None,
        z: Plan | PlanOf | None = None,
        z_init: Shaped[Tensor, "..."] | None = None,
        targets: Shaped[Tensor, "..."] | None = None,
    ) -> LMOutput | LMLoss:
        """Logits of the token after each position of ``tokens`` (integer ``B T``), and what they were read from.

        Args:
            attention_mask: bool or integer ``B T``, non-zero where a token is real; any pattern.
            cu_seqlens: integer ``n+1``, bounds of sequences packed end to end in one row; excludes mask and state.
            state: the stream that the tokens continue, which stays unchanged; then the output holds the next state.
            z: the plan, or a function that makes it of the blocks below, as ``model.sample_posterior`` does of the text
                with the encoder, also within a stream. None draws one from the prior (torch's global generator), as in
                generation; so the cross-entropy of these logits bounds the model's own from above.
            z_init: where the equilibrium's iterations start, ``B T D`` or ``B D``; None where the model would start.
                Changes equilibria within the tolerance only, except in the descent regime, where it selects among
                several. In a stream ``equilibrium.z[:, -1]`` of the step before is a warm start; ``generate`` starts
                where a whole pass does, which is nearer (``docs/design/005-mamba-hopfield.md``).
            targets: the token after each position, -100 where it does not count: pads are not left out by themselves.
                Then the output is an ``LMLoss``: their mean cross-entropy, for which logits above ``logits_bytes`` are
                never held whole.

        Raises: ValueError for ids outside the vocabulary, a sequence beyond ``max_seq_len`` (which counts the tokens
            that the state has seen), bad shapes, or a part that the model does not have.
        """
        if z is not None:
            require_plan(self)
        if z_init is not None:
            require_equilibrium(self)
        x, layout = self._embed(tokens, attention_mask, cu_seqlens, state)
        if self.plan is None:
            x, states = self._run_blocks(x, layout, state)
            return self._answer(targets, *self._settle(x, layout, state, states, None, z_init))
        half = self._lower(x, layout, state)
        if z is None:
            z = self.sample_prior(*half.x.shape[:2], device=half.x.device)
        else:
            z = z(half) if callable(z) else z
            check_plan(z, tuple(half.x.shape[:2]), self.plan.n_bits)
        return self._answer(targets, *self._upper_blocks(half, z, z_init))

    def _answer(
        self,
        targets: Tensor | None,
        x: Float[Tensor, "B T D"],
        state: LMState | None,
        found: Equilibrium | None,
    ) -> LMOutput | LMLoss:
        if targets is None:
            return self._read_out(x, state, found)
        check_targets(targets, tuple(x.shape[:2]), self.config.vocab_size)
        return self._loss_of(x, state, found, targets)

    def step(
        self,
        tokens: Shaped[Tensor, "..."],
        state: LMState,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        z: Plan | PlanOf | None = None,
        z_init: Shaped[Tensor, "..."] | None = None,
    ) -> LMOutput:
        """``forward`` with a state: logits after the next one or many tokens of a stream, and the new state."""
        output: LMOutput = self(tokens, attention_mask=attention_mask, state=state, z=z, z_init=z_init)
        return output

    def lower(
        self,
        tokens: Shaped[Tensor, "..."],
        state: LMState | None = None,
        *,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        cu_seqlens: Shaped[Tensor, "..."] | None = None,
    ) -> LowerOutput:
        """The blocks below the plan.

        Args:
            state: the stream that the tokens continue; then ``upper`` gives the next state.

        Raises: ValueError as ``forward``.
        """
        x, layout = self._embed(tokens, attention_mask, cu_seqlens, state)
        return self._lower(x, layout, state)

    def _lower(self, x: Float[Tensor, "B T D"], layout: SequenceLayout, state: LMState | None) -> LowerOutput:
        x, states = self._run_blocks(x, layout, state, last=require_plan(self).layer)
        return LowerOutput(x, layout, state, states)

    def posterior(self, half: LowerOutput) -> Float[Tensor, "B T H"]:
        """Bit logits of these tokens' codes, read from them and all tokens of the stream before; 0 at pads.

        Not causal: a token's logits depend on the tokens after it. Codes that earlier tokens have stay as they are.

        Raises: ValueError after tokens whose vectors the stream has not kept (``encode_again`` of ``init_state``).
        """
        require_plan(self)
        assert self.encoder is not None
        before = None if half.before is None else half.before.plan
        if before is None or not before.code.shape[1]:
            return self.encoder(half.x, half.layout)
        if before.hidden is None:
            raise ValueError(
                "state: the encoder reads earlier tokens too, whose vectors this stream does not keep; start it with "
                "init_state(..., encode_again=True)"
            )
        context = torch.cat([before.hidden.to(half.x), half.x], dim=1)
        masks = both_masks(before.mask, before.hidden, half.layout.mask, half.x)
        layout = sequence_layout(context, torch.cat([*masks[0], *masks[1]], dim=1) if masks[0] else None)
        return self.encoder(context, layout)[:, before.hidden.shape[1] :]

    def upper(self, half: LowerOutput, z: Plan, *, z_init: Shaped[Tensor, "..."] | None = None) -> LMOutput:
        """Logits of the next tokens under a plan, and the state after them if they continue a stream.

        Raises: ValueError if the plan has another shape than the tokens, or a code is not in ``[0, 2**H)``.
        """
        check_plan(z, tuple(half.x.shape[:2]), require_plan(self).n_bits)
        return self._read_out(*self._upper_blocks(half, z, z_init))

    def _upper_blocks(
        self, half: LowerOutput, z: Plan, z_init: Tensor | None
    ) -> tuple[Float[Tensor, "B T D"], LMState | None, Equilibrium | None]:
        layer = require_plan(self).layer
        assert self.post_sampler is not None
        before, source = half.before, half.x + self.post_sampler(z)
        x, states = self._run_blocks(half.x, half.layout, before, first=layer, source=source)
        plan = None
        if before is not None:
            assert before.plan is not None
            plan = before.plan.append(z.code, half.x, half.layout)
        return self._settle(x, half.layout, before, (*half.lower_states, *states), plan, z_init)

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

    def sample_posterior(self, half: LowerOutput, *, generator: torch.Generator | None = None) -> Plan:
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
        n_bits, device = require_plan(self).n_bits, device or device_of(self)
        return Plan(sample_code(n_bits, batch_size, n_tokens, device=device, generator=generator))

    @property
    def solver(self) -> SolverConfig:
        """How equilibria are found. Assigning another changes this model, not its config or checkpoints."""
        return require_equilibrium(self).solver

    @solver.setter
    def solver(self, solver: SolverConfig) -> None:
        require_equilibrium(self).solver = solver

    @property
    def memory(self) -> HopfieldMemory:
        """Learned patterns and writable slots of the equilibrium."""
        return require_equilibrium(self).memory

    @property
    def memory_patterns(self) -> nn.Parameter:
        """The learned patterns, the only parameter with ``memory`` in its name."""
        return self.memory.memory_patterns

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
        if equilibrium.is_real is not None:
            chosen = chosen & equilibrium.is_real
        if mask is not None:
            chosen = chosen & equilibrium.rows(mask)
        return self.memory.write(equilibrium.rows(equilibrium.z), chosen, in_eval=in_eval, warn=False)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute Mamba mixers and dynamics in the backward pass: the same gradients, slower, less memory.

        Raises: ValueError of a model without either.
        """
        self._checkpoint_gradients(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self._checkpoint_gradients(False)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        switches = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        if not switches:
            raise ValueError(
                "gradient_checkpointing: neither a Mamba mixer nor an equilibrium is in this model; the trainer's "
                "parallel.recompute_every recomputes whole blocks"
            )
        for module in switches:
            module.gradient_checkpointing = enabled  # type: ignore[assignment]


def require_plan(model: nn.Module) -> PlanConfig:
    """The plan of a model. Raises: ValueError if it has none."""
    plan: PlanConfig | None = getattr(model, "plan", None)
    if plan is None:
        raise ValueError(f"plan: wanted a model with a latent plan, got a {type(model).__name__} without one")
    return plan


def require_equilibrium(model: nn.Module) -> EquilibriumLayer:
    """The equilibrium layer of a model. Raises: ValueError if it has none."""
    layer: EquilibriumLayer | None = getattr(model, "equilibrium", None)
    if layer is None:
        kind = type(model).__name__
        raise ValueError(f"equilibrium: wanted a model with an equilibrium layer, got a {kind} without one")
    return layer
