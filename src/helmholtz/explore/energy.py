"""The energy in a plane through an equilibrium: its picture, paths from a point of it, and patterns stored by hand."""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check, check_choice
from helmholtz._notebook.html import cells, head_cells, note, table
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.evals.equilibria import equilibrium_of
from helmholtz.evals.landscape import EnergySlice, energy_slice, frame_radius
from helmholtz.evals.landscape_case import SAME, Basis, Plane, TokenCase, choose_plane, exact_case, token_case
from helmholtz.evals.landscape_flow import Basins, Trajectories, basins, critical_point, trajectories
from helmholtz.evals.landscape_flow import Path as SolverPath
from helmholtz.evals.landscape_plots import (
    MODE_STYLES,
    basin_legend,
    draw_basins,
    draw_energy,
    draw_plane,
    place_name,
)
from helmholtz.evals.plots import own_style
from helmholtz.explore.html import spell
from helmholtz.layers.equilibrium import TokenProblem
from helmholtz.layers.hopfield import HopfieldMemory
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.ops.hopfield import pattern_margins
from helmholtz.ops.token_energy import EnergyParameters, TokenField
from helmholtz.solvers import SolverConfig, solve

if TYPE_CHECKING:
    from PIL.Image import Image

View = Literal["energy", "basins"]
VIEWS: tuple[View, ...] = get_args(View)
RESOLUTION = 31
"""Points along a side, each of them solved for the basins."""
INCHES, DPI = (5.6, 5.2), 100
FRAME = (0.13, 0.11, 0.84, 0.84)
"""Left, bottom, width and height of the axes in the picture: how a click is read."""
SETTLE = SolverConfig(mode="picard", max_steps=500, rtol=1e-8, energy_rtol=1e-8, on_nonconvergence="ignore")
NAMES = {"picard": "plain steps"}


@dataclass(frozen=True)
class Scene:
    """A token's energy in a plane that stays when patterns are stored."""

    case: TokenCase
    plane: Plane
    ticks: Float[Tensor, "n"]

    @functools.cached_property
    def slice(self) -> EnergySlice:
        return energy_slice(self.case, self.plane, self.ticks)

    @functools.cached_property
    def basins(self) -> Basins:
        return basins(self.case, self.plane, self.ticks)

    def point(self, x: float, y: float) -> Float[Tensor, "D"]:
        """The point of the plane at coordinates in norms of the patterns."""
        at = torch.tensor([x, y], dtype=self.plane.axes.dtype) * self.case.radius
        return self.plane.origin + at @ self.plane.axes


def run_case(checkpoint: Checkpoint, text: str, token: int) -> tuple[TokenCase, list[str]]:
    """The energy of one token of a text, and the text's tokens. Raises: ValueError for a token that is not there."""
    tokens = checkpoint.encode(text)
    longest = checkpoint.model.config.max_seq_len
    check(len(tokens) <= longest, "text", f"{len(tokens)} tokens", f"at most {longest}")
    with one_convergence_warning(checkpoint.model):
        found = equilibrium_of(checkpoint.model, torch.tensor([tokens]))
    return token_case(found, checkpoint.model.solver, token=token), [
        spell(checkpoint.tokenizer, t) for t in tokens
    ]


def memory_case(n_patterns: int = 4, width: int = 12, beta: float = 2.5, seed: int = 0) -> TokenCase:
    """A Hopfield memory of random patterns, which nothing has trained, and a query: a corrupted pattern."""
    generator = torch.Generator().manual_seed(seed)
    memory = HopfieldMemory(width, 0, n_slots=n_patterns, beta=beta)
    memory.write(torch.randn(n_patterns, width, generator=generator), warn=False)
    patterns = memory.patterns().double()
    none = torch.zeros(1, 1, dtype=torch.float64)
    field = TokenField(u=none.expand(1, width), a=none, gate=none, delta=none)
    one = torch.ones(1, dtype=torch.float64)
    parameters = EnergyParameters(none.expand(1, width), patterns, memory.log_prior(), 0 * one, one, beta)
    noise = torch.randn(width, generator=generator, dtype=torch.float64)
    return _settled(TokenProblem(field, parameters), patterns[0] + 0.5 * noise, SolverConfig())


def _settled(problem: TokenProblem, start: Float[Tensor, "D"], solver: SolverConfig) -> TokenCase:
    """The case whose equilibrium plain steps reach from the start: that of its basin."""
    first = start.unsqueeze(0)
    return exact_case(problem, first, solve(problem, first, SETTLE).value, solver)


def scene_of(case: TokenCase, basis: Basis = "memory") -> Scene:
    plane = choose_plane(case, basis)
    radius = frame_radius(case, plane)
    return Scene(case, plane, torch.linspace(-radius, radius, RESOLUTION, dtype=torch.float64))


def store(scene: Scene, z: Float[Tensor, "D"]) -> Scene:
    """The scene after the direction of ``z`` has become a pattern of the memory, of the others' norm.

    Raises: ValueError for a point without a direction.
    """
    case, parameters = scene.case, scene.case.problem.parameters
    check(z.norm().item() > 1e-6 * case.radius, "point", "0", "a point with a direction")
    row = case.radius * z / z.norm()
    prior = parameters.log_prior
    more = parameters._replace(
        patterns=torch.cat([parameters.patterns, row.unsqueeze(0)]),
        log_prior=None if prior is None else torch.cat([prior, prior.new_zeros(1)]),
    )
    after = _settled(TokenProblem(case.problem.field, more), case.start, case.solver)
    near = scene.plane.distance(row).item() < SAME * case.radius
    anchors = (*scene.plane.anchors, len(after.patterns) - 1) if near else scene.plane.anchors
    return replace(scene, case=after, plane=replace(scene.plane, anchors=anchors))


def follow(scene: Scene, x: float, y: float) -> Trajectories:
    """Every solver mode from one point of the plane."""
    return trajectories(replace(scene.case, start=scene.point(x, y)))


def clicked(scene: Scene, column: float, row: float) -> tuple[float, float]:
    """Coordinates, in norms of the patterns, of a pixel of the picture; at the border for those outside its axes."""
    width, height = (round(inches * DPI) for inches in INCHES)
    left, bottom, wide, high = FRAME
    across, up = (column / width - left) / wide, (1 - row / height - bottom) / high
    radius = scene.ticks[-1].item() / scene.case.radius
    x, y = ((2 * min(max(part, 0.0), 1.0) - 1) * radius for part in (across, up))
    return x, y


def picture(scene: Scene, view: View, paths: Trajectories | None = None) -> "Image":
    """The plane, coloured by energy or by where plain steps end, and the paths of the solvers."""
    check_choice("view", view, VIEWS)
    with own_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        figure = Figure(figsize=INCHES, dpi=DPI)
        axes = figure.add_axes(FRAME)
        if view == "energy":
            draw_energy(axes, scene.slice)
        else:
            draw_basins(axes, scene.basins)
        draw_plane(axes, scene.slice)
        axes.set_aspect("auto")  # the frame is what a click is read by
        if paths is not None:
            _draw_paths(axes, scene, paths)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _draw_paths(axes: Any, scene: Scene, paths: Trajectories) -> None:
    for path in paths.paths:
        colour, marker, line = MODE_STYLES[path.mode]
        places = scene.plane.coordinates(path.iterates) / scene.case.radius
        style = {"color": "white" if path.mode == "picard" else colour, "linestyle": line, "marker": marker}
        axes.plot(*places.T.tolist(), markersize=4, linewidth=1.6, zorder=6, **style)


def paths_html(scene: Scene, paths: Trajectories) -> str:
    """A row per mode: how long it takes, and where it ends."""
    rows = [f"<tr>{cells(*_path_cells(scene.case, path))}</tr>" for path in paths.paths]
    heads = head_cells("solver", "ends at", "steps", "calls", "start energy")
    return table([heads], rows) + note(
        "Steps are counted until the relative residual stays below 1e-8; calls are evaluations of the map."
    )


def _path_cells(case: TokenCase, path: SolverPath) -> tuple[str, ...]:
    end = critical_point(case, path.iterates[-1])
    where = place_name(case, end) if path.converged else "not converged"
    steps = path.num_steps(1e-8)
    counted = "more" if steps is None else str(steps)
    return (
        NAMES.get(path.mode, path.mode),
        where,
        counted,
        str(path.num_evaluations),
        f"{path.energy[0]:+.3f}",
    )


def summary_html(scene: Scene, stored: int, before: Scene | None = None) -> str:
    """What there is to be seen in the plane, and beside it what there was before patterns were stored."""
    lines = [_summary(scene)]
    if before is not None and stored:
        lines.append(
            f"Before {stored} {'pattern was' if stored == 1 else 'patterns were'} stored: {_summary(before)}"
        )
        moved = (scene.case.z - before.case.z).norm().item() / scene.case.radius
        lines.append(f"The equilibrium that the start leads to has moved by {moved:.2f} R.")
    return "".join(map(note, lines))


def _summary(scene: Scene) -> str:
    case, found = scene.case, scene.basins
    n_ends, n_patterns = len(found.attractors), len(case.patterns)
    places = "one place" if n_ends == 1 else f"{n_ends} places"
    parameters = case.problem.parameters
    margin = pattern_margins(case.patterns, parameters.beta).amin().item() if n_patterns > 1 else float("inf")
    bound = case.certificate
    unique = "so that there is one equilibrium" if bound < 1 else "so that several equilibria are possible"
    return (
        f"{n_patterns} patterns, worst retrieval margin {margin:.1f} nats (3 and more retrieve reliably). Plain steps "
        f"from this plane end in {places}. The map's Lipschitz constant is at most {bound:.2g}, {unique}."
    )


def legend_html(scene: Scene, view: View) -> str:
    """What the marks of the picture are, and of the basins their colours."""
    marks = (
        "Star: the equilibrium. Square: where the model starts. Diamonds: patterns in the plane; dots: shadows of the "
        "others. Paths: alternating blue, simultaneous orange, cascade green, plain steps dotted."
    )
    if view == "energy":
        return note(f"{marks} Dark is low energy; arrows point downhill.")
    patches, names = basin_legend(scene.basins)
    colours = [patch.get_facecolor() for patch in patches]
    boxes = "".join(
        f'<span style="display:inline-block;width:12px;height:12px;margin:0 4px 0 12px;background:rgb('
        f'{",".join(str(round(255 * part)) for part in colour[:3])})"></span>{name}'
        for colour, name in zip(colours, names, strict=True)
    )
    return f'<p class="hz-note">{boxes}</p>{note(marks)}'
