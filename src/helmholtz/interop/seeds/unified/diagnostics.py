"""What ``model(ids, return_diagnostics=True)`` tells, as the README reads it."""

from typing import Any

from helmholtz.layers.equilibrium import Equilibrium

TOP = 10


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
