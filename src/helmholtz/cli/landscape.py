"""``helmholtz landscape``."""

import math
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from helmholtz._checks import check, check_integer
from helmholtz._files import write_json
from helmholtz.cli.arguments import Parser, make_parser, output_folder, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.evals.checkpoints import Checkpoint, open_checkpoint
from helmholtz.evals.landscape import EnergyLandscapeAnalyzer, EnergySlice, MemoryOrganisation
from helmholtz.evals.landscape_case import SAME, Basis
from helmholtz.evals.landscape_flow import Basins, CriticalPoint, Trajectories
from helmholtz.evals.landscape_plots import plot_basins, plot_memory, plot_slice, plot_trajectories
from helmholtz.evals.plots import visible
from helmholtz.models.decoder import require_equilibrium

DESCRIPTION = (
    "The energy around a token's equilibrium: a slice, the solvers' paths, basins of attraction, the memory."
)


def make_landscape_parser() -> Parser:
    parser = make_parser("landscape", DESCRIPTION)
    option = parser.add_argument
    add_checkpoint(parser)
    option("--text", type=str, default=None, help="text whose tokens are solved for")
    option("--ids", type=list[int] | None, default=None, help="token ids instead of a text, such as [5,17,3]")
    option(
        "--token",
        type=int,
        default=-1,
        help="token whose energy is drawn; negative numbers count from the end",
    )
    option(
        "--basis",
        type=Basis,
        default="memory",
        help="directions that span the plane of the slice and the basins",
    )
    option(
        "--radius",
        type=float | None,
        default=None,
        help="half the side of the slice; default: large enough for all marks",
    )
    option("--resolution", type=int, default=61, help="grid points per side, an odd number")
    option("--seed", type=int, default=0, help="seed of random directions")
    option("--output", type=str, required=True, help="folder for the figures and landscape.json")
    option("--threads", type=int, default=1, help="number of CPU threads")
    return parser


def read_tokens(values: dict[str, Any], checkpoint: Checkpoint) -> tuple[torch.Tensor, str]:
    """Ids of the text, and how to name the token in titles."""
    text, ids, place = values["text"], values["ids"], values["token"]
    if (text is None) == (ids is None):
        raise ValueError("text and ids: wanted one of them")
    check(text != "" and ids != [], "text or ids", text if ids is None else ids, "not empty")
    tokenizer = checkpoint.tokenizer if ids is None else None
    ids, of = (ids, "the ids") if tokenizer is None else (tokenizer.encode(text), "the text's tokens")
    check(-len(ids) <= place < len(ids), "token", place, f"in [{-len(ids)}, {len(ids)}), {of}")
    name = f"id {ids[place]}" if tokenizer is None else repr(visible(tokenizer.decode([ids[place]])))
    return torch.tensor([ids]), f"token {place % len(ids)}, {name}"


def slice_to_dict(found: EnergySlice) -> dict[str, Any]:
    return {
        "basis": found.plane.basis,
        "axes": found.plane.names,
        "patterns_in_plane": found.plane.anchors,
        "radius": found.ticks[-1].item(),
        "lowest": found.lowest,
        "highest_energy": found.energy.max().item(),
    }


def trajectories_to_dict(found: Trajectories) -> dict[str, Any]:
    rtol = found.case.solver.rtol
    paths = {
        path.mode: {
            "steps_to_rtol": path.num_steps(rtol),
            "steps": len(path.energy) - 1,
            "evaluations": path.num_evaluations,
            "converged": path.converged,
            "ends_at_equilibrium": path.ends_at_equilibrium,
            "energy": path.energy.tolist(),
            "residual": path.residual.tolist(),
        }
        for path in found.paths
    }
    return {"certificate": found.certificate, "contraction": found.contraction, "rtol": rtol, "paths": paths}


def basins_to_dict(found: Basins, by_solver: Basins) -> dict[str, Any]:
    """Of plain steps; ``solver_agrees`` is the part of the starts from which the model's solver ends where they do."""
    same = [
        found.converged[j, i]
        and by_solver.converged[j, i]
        and (found.end(j, i).z - by_solver.end(j, i).z).norm() < SAME * found.case.radius
        for j in range(len(found.ticks))
        for i in range(len(found.ticks))
    ]
    return {
        "solver_agrees": sum(map(bool, same)) / len(same),
        "shares": found.shares,
        "unconverged": 1 - found.converged.double().mean().item(),
        "mean_steps": found.num_steps.double().mean().item(),
        "largest_steps": int(found.num_steps.max()),
    }


def point_to_dict(point: CriticalPoint) -> dict[str, Any]:
    """All but the place, which is as long as the model is wide."""
    values = {"kind": point.kind} | asdict(point)
    del values["z"]
    return values


def memory_to_dict(found: MemoryOrganisation) -> dict[str, Any]:
    return {
        "n_patterns": len(found.usage),
        "margin": found.margin,
        "largest_cosine": found.largest_cosine,
        "used_patterns": math.exp(found.usage_entropy),
        "used_patterns_per_token": math.exp(found.token_entropy),
        "most_used": found.most_used[:10].tolist(),
        "usage_of_most_used": found.usage[found.most_used[:10]].tolist(),
    }


def run(arguments: list[str], console: Console) -> int:
    values = parse(make_landscape_parser(), arguments)
    check_integer("threads", values["threads"])
    torch.set_num_threads(values["threads"])
    folder = output_folder("output", values["output"], figures=True)
    checkpoint = open_checkpoint(values["checkpoint"], "equilibrium")
    model = checkpoint.model
    tokens, name = read_tokens(values, checkpoint)
    analyzer = EnergyLandscapeAnalyzer.of(model, tokens, seed=values["seed"])
    plane = {key: values[key] for key in ("token", "basis", "radius", "resolution")}
    found, paths = analyzer.slice(**plane), analyzer.trajectories(token=values["token"])
    around, memory = analyzer.basins(**plane), analyzer.memory()
    points = analyzer.critical_points(around)
    regime = require_equilibrium(model).config.stability
    title = f"{regime} model, {name}"
    plot_slice(found, folder / "slice.png", title=f"Energy of {name} ({regime} regime)")
    plot_trajectories(paths, folder / "trajectories.png", title=f"How the solvers converge: {title}")
    plot_basins(around, folder / "basins.png", title=f"Where starts end: {title}", points=points)
    used = f"{len(memory.usage)} patterns and {tokens.shape[1]} tokens"
    plot_memory(memory, folder / "memory.png", title=used)
    content = {
        "model": model.config.to_dict(),
        "tokens": tokens[0].tolist(),
        "token": values["token"],
        "slice": slice_to_dict(found),
        "trajectories": trajectories_to_dict(paths),
        "basins": basins_to_dict(around, analyzer.basins(**plane, mode=model.solver.mode)),
        "critical_points": [point_to_dict(point) for point in points],
        "memory": memory_to_dict(memory),
    }
    write_json(folder / "landscape.json", content)
    names = "slice.png, trajectories.png, basins.png, memory.png and landscape.json"
    console.print(f"wrote {names} in {folder}")
    return 0
