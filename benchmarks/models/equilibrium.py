"""The equilibrium model at the size of the original's README: forward and backward, each way to solve.

    python benchmarks/models/equilibrium.py --threads 2

Width 512, 64 states, 6 blocks, 5,000 patterns, vocabulary 10,000, 2 x 128 tokens, converged at 1e-3.

Floor of forward + backward: the 17.2 M weights of projections and output matrix multiply 256 tokens in 6 FLOPs each,
26 GFLOP. One map (5000 x 512 patterns and 1024 x 512 weights, each used twice) costs 3.2 GFLOP: at the start and after
each of two steps 9.5, under the gradient, with its backward, 9.5; reading the memory 8; four products with the Jacobian
in the backward, of 1.5 maps each, 19; the bound of the spectral norm 6. Together 78 GFLOP, for which products of large
matrices take ``floor_seconds`` here.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import interleave, parse_options, print_table, write_results

from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.models.decoder import Decoder
from helmholtz.models.mamba import Mamba, MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig, medium
from helmholtz.ops.losses import cross_entropy
from helmholtz.solvers import SolverConfig

BATCH, TIME, VOCABULARY = 2, 128, 10_000
MODES = ("alternating", "simultaneous", "cascade", "picard", "anderson")
FLOOR = 78e9


def check(found: Equilibrium, exact: Equilibrium, mode: str) -> None:
    """Stop unless every token has converged and is as near to its equilibrium as the tolerance says."""
    rtol = SolverConfig().rtol
    if not bool(found.converged.all()):
        raise RuntimeError(f"{mode}: {int((~found.converged).sum())} tokens have not converged")
    distance = ((found.z - exact.z).norm(dim=-1) / exact.z.norm(dim=-1)).max().item()
    allowed = 10 * rtol / (1 - found.certificate())
    if not distance <= allowed:
        raise RuntimeError(f"{mode}: an equilibrium is off by {distance:.3g}, allowed {allowed:.3g}")


def passes(model: Decoder, tokens: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    @torch.no_grad()
    def forward() -> None:
        model(tokens[:, :-1])

    def both() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()

    return forward, both


def product() -> Callable[[], Tensor]:
    """Two billion FLOPs at the machine's best."""
    a, b = torch.randn(1000, 1000), torch.randn(1000, 1000)
    return lambda: a @ b


def main() -> None:
    options = parse_options("mamba_hopfield", __doc__, rounds=5)
    torch.manual_seed(0)
    config: MambaHopfieldConfig = medium(VOCABULARY)
    model, tokens = MambaHopfield(config), torch.randint(VOCABULARY, (BATCH, TIME + 1))
    names = MambaConfig.__dataclass_fields__
    plain = Mamba(MambaConfig(**{name: getattr(config, name) for name in names}))
    with torch.no_grad():
        model.solver = SolverConfig(max_steps=100, rtol=1e-6, energy_rtol=1e-6)
        exact = model(tokens[:, :-1]).equilibrium
    candidates: dict[str, Callable[[], object]] = {"product": product()}
    candidates["Mamba, forward"], candidates["Mamba"] = passes(plain, tokens)
    facts: dict[str, dict[str, float]] = {}
    for mode in MODES:
        solver = replace(config.solver, mode=mode)
        with torch.no_grad():
            model.solver = solver
            found = model(tokens[:, :-1]).equilibrium
        check(found, exact, mode)
        facts[mode] = {
            "steps": found.num_steps.double().mean().item(),
            "max_steps": float(found.num_steps.max()),
            "evaluations": found.solution.num_evaluations.double().mean().item(),
            "products": found.solution.num_products.double().mean().item(),
        }
        for suffix, run in zip((", forward", ""), passes(model, tokens), strict=True):
            candidates[mode + suffix] = _with_solver(model, solver, run)
    seconds = interleave(candidates, rounds=options.rounds, warmup=1)
    floor = FLOOR * seconds["product"] / 2e9
    nothing = dict.fromkeys(facts[MODES[0]], 0.0)
    rows = [
        {
            "model": name,
            "forward_s": seconds[f"{name}, forward"],
            "forward_backward_s": seconds[name],
            "to_floor": seconds[name] / floor,
            "tokens_per_s": BATCH * TIME / seconds[name],
            **facts.get(name, nothing),
        }
        for name in ("Mamba", *MODES)
    ]
    print_table(rows)
    print(f"floor of forward + backward: {floor:.3g} s")
    write_results(options, [*rows, {"model": "floor", "floor_seconds": floor}])


def _with_solver(model: MambaHopfield, solver: SolverConfig, run: Callable[[], None]) -> Callable[[], None]:
    def solved() -> None:
        model.solver = solver
        run()

    return solved


if __name__ == "__main__":
    main()
