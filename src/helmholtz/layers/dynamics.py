"""From the context of a token to the energy whose minimum is its equilibrium."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from helmholtz._values import has_values
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.hopfield import StoredPatterns
from helmholtz.layers.init import init_normal
from helmholtz.layers.mamba import MambaCell
from helmholtz.layers.sequence import SequenceLayout
from helmholtz.ops._compute import compute_dtype, full_precision
from helmholtz.ops.spectral import spectral_norm_bound
from helmholtz.ops.token_energy import EnergyParameters, TokenField

MAX_CONTRACTION = 0.9
"""Bound of the map's Lipschitz constant in the contractive regime."""


@dataclass(frozen=True, slots=True)
class Dynamics:
    """The energies of the real tokens of a call, and where the tokens are. Where no values are, pads have one too."""

    field: TokenField
    parameters: EnergyParameters
    """What the energies share."""
    start: Float[Tensor, "B T D"]
    """Where the iteration starts; also defined at pads."""
    index: Int[Tensor, "N"] | None
    """Place of each row of ``field`` among the ``B T`` tokens; None if each token has one."""
    is_real: Bool[Tensor, "N"] | None
    """Rows of real tokens, where pads have one too; None: all are."""
    state: Float[Tensor, "B H P S"]
    """The recurrence after the call."""
    bound: Float[Tensor, "1"] | None
    """Of the weight's spectral norm, in the contractive regime."""


@final
class TokenDynamics(nn.Module):
    r"""The token energy's coefficients: fields of each token from its context, strengths shared by all.

    With :math:`a, \delta` from the recurrence of ``mamba``, :math:`u = W_u c`, :math:`\gamma = \sigma(W_g c)` and
    patterns :math:`m_i` of norm :math:`R`, the map of a token is

    .. math:: f(z) = u + \kappa W^\top (\gamma \tanh(a + \delta W z)) + \lambda \sum_i p_i(z) m_i.

    In the contractive regime :math:`(w_\kappa, w_\lambda, w_0) = \mathrm{softmax}(\theta)`,
    :math:`\kappa = 0.9 w_\kappa`, :math:`\lambda = 0.9 w_\lambda / (\beta R^2)` and :math:`|W|_2 \le 1`, so that the
    map's Lipschitz constant is below :math:`0.9 (w_\kappa + w_\lambda) < 0.9`. In the descent regime
    :math:`\kappa, \lambda` are exponentials of free parameters and :math:`W` is as it is.

    Fields and strengths are computed in at least float32, also under autocast.
    """

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__()
        self.config = c = config
        self.mamba = MambaCell(c.d_model, d_inner=c.d_inner, d_state=c.d_state, d_head=c.d_head)
        self.u_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.start_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.gate_proj = nn.Linear(c.d_model, c.d_inner)
        self.weight = nn.Parameter(torch.empty(c.d_inner, c.d_model))
        if c.stability == "contractive":
            self.theta = nn.Parameter(torch.zeros(3))
        else:
            self.log_strengths = nn.Parameter(torch.zeros(2))
        init_normal(self.gate_proj)
        self._init_scales()

    @torch.no_grad()
    def _init_scales(self) -> None:
        """``|u|`` near the patterns' norm for a context of unit mean square, ``|W|_2`` near 1, start at ``u``."""
        if self.weight.is_meta:
            return
        d_inner, d_model = self.weight.shape
        nn.init.normal_(self.u_proj.weight, std=d_model**-0.75)
        self.start_proj.weight.copy_(self.u_proj.weight)
        nn.init.normal_(self.weight, std=1 / (d_inner**0.5 + d_model**0.5))

    def forward(
        self,
        c: Float[Tensor, "B T D"],
        layout: SequenceLayout,
        stored: StoredPatterns,
        state: Float[Tensor, "B H P S"] | None = None,
        bound: Float[Tensor, "1"] | None = None,
    ) -> Dynamics:
        """Fields of the real tokens and what their energies share; ``state`` is that of the recurrence before them.

        ``bound`` is that of an earlier call; None works it out.

        Where no values are, as in a compiled graph, all tokens have a row: how many are real is not known.
        """
        past, gain, state = self.mamba(c, layout, state)
        wide = compute_dtype(c, self.weight)
        index, is_real = None, None if layout.mask is None else layout.mask.flatten()
        if is_real is not None and has_values(is_real):
            index, is_real = is_real.nonzero().squeeze(1), None

        def rows(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return (x if index is None else x[index]).to(wide)

        field = TokenField(
            u=rows(self.u_proj(c)), a=rows(past), gate=rows(self.gate_proj(c)).sigmoid(), delta=rows(gain)
        )
        start = self.start_proj(c).to(wide)
        if bound is None and self.config.stability == "contractive":
            with full_precision(c.device):
                bound = spectral_norm_bound(self.weight)
        return Dynamics(field, self.energy_parameters(stored, bound), start, index, is_real, state, bound)

    def energy_parameters(
        self, stored: StoredPatterns, bound: Float[Tensor, "1"] | None = None
    ) -> EnergyParameters:
        """What the energies of all tokens share, given what their memory holds; ``bound`` as of ``forward``."""
        wide = compute_dtype(self.weight)
        with full_precision(self.weight.device):
            weight = self.weight.to(wide)
            if self.config.stability == "contractive":
                kappa, strength = (MAX_CONTRACTION * self.theta.to(wide).softmax(0))[:2].split(1)
                strength = strength / (stored.beta * stored.radius**2)
                bound = spectral_norm_bound(weight) if bound is None else bound.to(weight)
                weight = weight / torch.where(bound > 0, bound, 1)
            else:
                kappa, strength = self.log_strengths.to(wide).exp().split(1)
            return EnergyParameters(
                weight=weight,
                patterns=stored.patterns.to(wide),
                log_prior=stored.log_prior,
                kappa=kappa,
                strength=strength,
                beta=stored.beta,
            )
