"""The model in the original names, on ``helmholtz.models.MambaHopfield``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from helmholtz._checks import check, check_integer
from helmholtz.interop.seeds.unified.config import SolverType, UnifiedModelConfig, model_config
from helmholtz.layers.dynamics import TokenDynamics
from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.mamba_hopfield import MambaHopfield
from helmholtz.solvers import SolverConfig

ModelT = TypeVar("ModelT", bound="UnifiedMambaHopfieldDEQ")
TOP = 10


def _renamed(core: str) -> Any:
    def read(view: "SolverView") -> Any:
        return getattr(view.config, core)

    def write(view: "SolverView", value: Any) -> None:
        view._model.solver = replace(view.config, **{core: value})

    return property(
        read, write, doc=f"``SolverConfig.{core}``; assigning checks it and acts on the next call."
    )


class SolverView:
    """Settings of a model's solver. Assigning any other name is an AttributeError."""

    __slots__ = ("_model",)

    def __init__(self, model: Decoder) -> None:
        self._model = model

    @property
    def config(self) -> SolverConfig:
        """The settings in the library's own names."""
        return self._model.solver

    @property
    def tolerance(self) -> float:
        """``tol_fixedpoint``; assigning sets ``tol_energy`` too, as an equilibrium is found when both are met."""
        return self.config.rtol

    @tolerance.setter
    def tolerance(self, value: float) -> None:
        self._model.solver = replace(self.config, rtol=value, energy_rtol=value)

    max_iter = _renamed("max_steps")
    tol_fixedpoint = _renamed("rtol")
    tol_energy = _renamed("energy_rtol")
    solver_type = _renamed("mode")
    anderson_memory = _renamed("anderson_window")


class _NotGiven:
    """Tells ``z_init=None`` from no ``z_init``: only the first asks for diagnostics."""


_NOT_GIVEN = _NotGiven()


class UnifiedMambaHopfieldDEQ(nn.Module):
    """A Mamba stack and the equilibria of a token energy with a Hopfield memory; the library's own is ``model``.

    Args: as ``UnifiedModelConfig``, whose docstrings say what each means.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        d_state: int = 64,
        d_conv: int = 4,
        n_layers: int = 6,
        memory_size: int = 1024,
        beta: float = 2.0,
        solver_type: SolverType = "alternating",
        max_iterations: int = 30,
        tol_fixedpoint: float = 1e-3,
        tol_energy: float = 1e-3,
        *,
        n_slots: int = 0,
        stability: Literal["contractive", "descent"] = "contractive",
        max_seq_len: int = 1_048_576,
    ) -> None:
        given = locals()
        super().__init__()
        self.config = UnifiedModelConfig(**{name: given[name] for name in UnifiedModelConfig.__slots__})
        self.model = MambaHopfield(self.config.to_core())

    @classmethod
    def from_config(
        cls: type[ModelT], config: Mapping[str, Any] | UnifiedModelConfig, vocab_size: int | None = None
    ) -> ModelT:
        """The model that a ``UnifiedModelConfig`` or the README's dictionary describes.

        The dictionary names no vocabulary, so give its size. Keys that describe training are the trainer's.

        Raises: ValueError for an unknown key, or one of the original that has no meaning here.
        """
        made = model_config(config, vocab_size)
        return cls(**{name: getattr(made, name) for name in made.__slots__})

    @property
    def solver(self) -> SolverView:
        """How equilibria are found; ``model.solver.max_iter = 10`` acts on the next call."""
        return SolverView(self.model)

    @property
    def dynamics(self) -> TokenDynamics:
        """What makes the energies from the context; ``dynamics.mamba`` is the recurrence in them."""
        return self.model.equilibrium.dynamics

    @property
    def memory_patterns(self) -> Float[nn.Parameter, "K D"]:
        """The learned patterns: the only parameter with "memory" in its name."""
        return self.model.memory_patterns

    @overload
    def forward(self, input_ids: Tensor, *, return_diagnostics: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, input_ids: Tensor, *, z_init: Tensor | None = ..., return_diagnostics: bool = ...
    ) -> tuple[Tensor, dict[str, Any]]: ...

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        z_init: Shaped[Tensor, "..."] | _NotGiven | None = _NOT_GIVEN,
        return_diagnostics: bool = False,
    ) -> Float[Tensor, "B T vocab"] | tuple[Float[Tensor, "B T vocab"], dict[str, Any]]:
        """Logits of the next tokens; with ``z_init`` (even None) or ``return_diagnostics`` also the diagnostics.

        Nothing is ever written into the memory here: ``update_memory`` does that.

        Args:
            z_init: where the iteration starts, ``B T D`` or ``B D``; None: where the model starts it. With one
                equilibrium per token (``stability="contractive"``) it changes the number of iterations only.

        Raises: ValueError for ids outside the vocabulary, or a ``z_init`` of another shape, naming both.
        """
        start = None if isinstance(z_init, _NotGiven) else z_init
        output = self.model(input_ids, z_init=start)
        if isinstance(z_init, _NotGiven) and not return_diagnostics:
            return output.logits
        return output.logits, diagnostics(output.equilibrium, self.model.solver.mode)

    @torch.no_grad()
    def update_memory(
        self, z: Float[Tensor, "*N D"], should_store: Shaped[Tensor, "..."] | None = None
    ) -> int:
        """Write states into the writable slots; the number stored. Training mode only.

        Args:
            should_store: bool, one per state; None: all. A state like a stored one (cosine of 0.9) is not stored.

        Raises: ValueError in evaluation mode, or if the model has no slots (``n_slots``).
        """
        rows = z.detach().flatten(0, -2)
        mask = None if should_store is None else should_store.flatten().bool()
        return self.model.memory.write(rows, mask, warn=False).changed

    def generate(
        self,
        prompt_ids: Int[Tensor, "B P"],
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 50,
    ) -> Int[Tensor, "B S"]:
        """Prompts and their continuations, ``max_length`` tokens in all; temperature 0 takes the likeliest token.

        The seed is drawn from torch's global generator: after ``torch.manual_seed`` the result is the same again.

        Raises: ValueError if the prompt is not shorter than ``max_length``, or a setting is out of range.
        """
        check(prompt_ids.ndim == 2, "prompt_ids", tuple(prompt_ids.shape), "of shape (B, P)")
        check_integer("max_length", max_length)
        prompt = prompt_ids.shape[1]
        wanted = f"above the prompt's {prompt} tokens, which it counts"
        check(prompt < max_length, "max_length", max_length, wanted)
        settings = SamplingSettings(
            max_new_tokens=max_length - prompt,
            temperature=temperature,
            top_k=top_k,
            seed=int(torch.randint(2**31, ())),
        )
        new = generate(self.model, prompt_ids.tolist(), settings)
        return torch.cat([prompt_ids, prompt_ids.new_tensor(new)], dim=1)


UnifiedModel = UnifiedMambaHopfieldDEQ


def diagnostics(equilibrium: Equilibrium, mode: str) -> dict[str, Any]:
    """Plain values and detached tensors, except ``z_equilibrium`` and ``z_init``, which carry gradients.

    ``context`` is the ``Equilibrium`` of the call: energies, maps and solutions of all its tokens, for the tools.
    """
    return {
        "solver_info": _solver_info(equilibrium, mode),
        "z_equilibrium": equilibrium.z,
        "z_init": equilibrium.z_init,
        "energy_trajectory": list(equilibrium.solution.energy_history),
        "context": equilibrium,
        "retrieval": {
            "retrieved": equilibrium.retrieved.detach(),
            "entropy": equilibrium.entropy().detach(),
            "top_pattern": equilibrium.top_pattern(),
        },
        "memory_usage": _memory_usage(equilibrium),
    }


def _solver_info(equilibrium: Equilibrium, mode: str) -> dict[str, Any]:
    solution, converged = equilibrium.solution, equilibrium.converged
    components = equilibrium.components()
    return {
        "converged": bool(converged.all()),
        "converged_fraction": solution.converged.float().mean().item(),
        "iterations": int(solution.num_steps.max()),
        "iterations_mean": solution.num_steps.float().mean().item(),
        "nfe": solution.num_evaluations.float().mean().item(),
        "final_energy": solution.energy.mean().item(),
        "final_fp_residual": solution.residual.max().item(),
        "final_energy_change": solution.energy_change.max().item(),
        "energy_history": list(solution.energy_history),
        "residual_history": list(solution.residual_history),
        "energy_components": {
            name: getattr(components, name).mean().item()
            for name in ("quadratic", "field", "mamba", "hopfield")
        },
        "lipschitz_certificate": equilibrium.certificate(),
        "mode": mode,
        "per_token": {
            "converged": converged,
            "iterations": equilibrium.num_steps,
            "energy": equilibrium.scatter(solution.energy),
            "residual": equilibrium.scatter(solution.residual),
        },
    }


def _memory_usage(equilibrium: Equilibrium) -> dict[str, Any]:
    usage = equilibrium.usage().detach()
    return {
        "attention_entropy": equilibrium.rows(equilibrium.entropy()).mean().item(),
        "top_10_mass": usage.topk(min(TOP, len(usage))).values.sum().item(),
        "num_patterns": len(usage),
    }
