"""``model.solver`` in the original names: a view of the core's settings whose attributes can be assigned."""

from dataclasses import replace
from typing import Any

from helmholtz.models.decoder import Decoder
from helmholtz.solvers import SolverConfig


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
