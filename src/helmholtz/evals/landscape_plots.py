"""Figures of a token's energy and of the memory. matplotlib (extra ``plot``) is imported where it is used.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart; lengths are in norms ``R`` of the
patterns.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helmholtz.evals.landscape import EnergySlice, MemoryOrganisation
from helmholtz.evals.landscape_case import SAME, TokenCase, flat
from helmholtz.evals.landscape_flow import Basins, CriticalPoint, Trajectories
from helmholtz.evals.landscape_flow import Path as SolverPath
from helmholtz.evals.plots import saved_figure

COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
"""Of basins: the last stands for all further ones."""
LAST = len(COLOURS) - 1
MODE_STYLES = {
    "alternating": ("#0072B2", "o", "-"),
    "simultaneous": ("#D55E00", "s", "-"),
    "cascade": ("#009E73", "^", "-"),
    "picard": ("#000000", ".", ":"),
}
LOWEST_SHOWN = 1e-13
"""Smaller energies and residuals are rounding, and drawn here."""
SIZE = (8.5, 4.3)
TALL = (8.5, 5.0)
WIDE = (11.0, 4.4)
"""Inches: of two panels, of two above a long legend, of three."""
ARROWS = 13
"""Arrows along a side."""


def plot_slice(found: EnergySlice, file: Path, *, title: str) -> None:
    """Contours of the energy with the descent in the plane, and beside them the residual on a logarithmic scale."""
    ticks = _ticks(found)
    heat = found.residual.clamp(min=1e-12).log10()
    # the equilibrium itself, at rounding, would take all colours
    lowest = torch.quantile(heat.flatten(), 0.002).item()
    steps = torch.linspace(lowest, heat.max().item(), 24).tolist()
    off = math.hypot(*found.lowest) > 1e-9 * found.case.radius
    place = "not the lowest point of this plane" if off else "the lowest point of this plane"
    with saved_figure(file, SIZE, few_colours=True) as figure:
        left, right = figure.subplots(1, 2)
        filled = draw_energy(left, found)
        _colour_bar(figure, filled, left, "energy above the equilibrium")
        left.set_title("energy and its descent", fontsize=10)
        filled = right.contourf(ticks, ticks, heat.tolist(), levels=steps, cmap="cividis", extend="min")
        _colour_bar(figure, filled, right, "log10 |f(z) - z|")
        right.set_title("residual: length of a plain step", fontsize=10)
        for axes in (left, right):
            draw_plane(axes, found)
        shown = left.get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower center", ncols=4, fontsize=8, facecolor="0.85")
        figure.suptitle(f"{title}\nthe equilibrium is {place}", fontsize=10)


def draw_energy(axes: Any, found: EnergySlice) -> Any:
    """Contours of the energy and its descent; what a colour bar is made of."""
    ticks, energy, levels = _ticks(found), found.energy.tolist(), _levels(found.energy)
    filled = axes.contourf(ticks, ticks, energy, levels=levels, cmap="cividis", extend="both")
    axes.contour(ticks, ticks, energy, levels=levels, colors="white", linewidths=0.4, alpha=0.5)
    _draw_arrows(axes, found)
    return filled


def _ticks(found: EnergySlice | Basins) -> list[float]:
    ticks: list[float] = (found.ticks / found.case.radius).tolist()
    return ticks


def _colour_bar(figure: Any, mapped: Any, axes: Any, label: str) -> Any:
    bar = figure.colorbar(mapped, ax=axes, shrink=0.85, format="%.3g")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def _levels(energy: Tensor) -> list[float]:
    """Denser near the equilibrium, as the energy is nearly quadratic."""
    highest = max(energy.max().item(), 1e-12)
    lowest = min(energy.min().item(), 0.0)
    above = [highest * (step / 18) ** 2 for step in range(19)]
    below = [lowest * (1 - step / 6) for step in range(6)] if lowest < -1e-9 * highest else []
    return below + above


def _draw_arrows(axes: Any, found: EnergySlice) -> None:
    every = max(1, (len(found.ticks) - 1) // (ARROWS - 1))
    chosen = slice(every // 2, None, every)
    places = _ticks(found)[chosen]
    descent = found.descent[chosen, chosen]
    # length grows with the root of the force, so that weak ones still show a direction
    arrows = descent / descent.norm(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
    x, y = (arrows[..., i].tolist() for i in range(2))
    axes.quiver(places, places, x, y, color="white", alpha=0.8, width=0.004)


def draw_plane(axes: Any, found: EnergySlice | Basins) -> None:
    """The equilibrium, the start, patterns in the plane, and the shadows of the other ones that fall into the frame."""
    case, plane, ticks = found.case, found.plane, _ticks(found)
    anchors = list(plane.anchors)
    others = [index for index in range(len(case.patterns)) if index not in anchors]

    def draw(z: Tensor, label: str, **style: Any) -> None:
        places = plane.coordinates(z).view(-1, 2) / case.radius
        axes.scatter(*places.T.tolist(), label=label, **style)

    edge = {"edgecolors": "black", "linewidths": 1, "zorder": 4}
    if others:
        shadow = {"s": 4, "alpha": 0.5, "linewidths": 0, "zorder": 3}
        draw(case.patterns[others], "other patterns' shadows", color="white", **shadow)
    if anchors:
        draw(case.patterns[anchors], "patterns in the plane", s=50, marker="D", color="white", **edge)
    away = plane.distance(case.start).item() / case.radius
    label = f"start ({away:.2f} R off the plane)" if away > 0.01 else "start"
    draw(case.start, label, s=40, marker="s", color="black", edgecolors="white", zorder=4)
    draw(case.z, "equilibrium", s=150, marker="*", color="#D55E00", **edge)
    axes.set(xlim=(ticks[0], ticks[-1]), ylim=(ticks[0], ticks[-1]), aspect="equal", facecolor="0.5")
    axes.set_xlabel(f"{plane.names[0]} (R)", fontsize=9)
    axes.set_ylabel(f"{plane.names[1]} (R)", fontsize=9)
    axes.tick_params(labelsize=8)


def plot_trajectories(found: Trajectories, file: Path, *, title: str) -> None:
    """Energy and residual at each step of every mode, and their paths in the plane of their main directions."""
    with saved_figure(file, WIDE, few_colours=True) as figure:
        first, second, third = panels = figure.subplots(1, 3)
        for path in found.paths:
            colour, marker, line = MODE_STYLES[path.mode]
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.2}
            energy, residual = (x.clamp(min=LOWEST_SHOWN).tolist() for x in (path.energy, path.residual))
            first.semilogy(energy, label=_path_label(path, found), **style)
            second.semilogy(residual, **style)
            third.plot(*_main(found, path.iterates).T.tolist(), **style)
        _draw_slopes(second, found)
        first.set(xlabel="step", ylabel="energy above the equilibrium", title="energy")
        second.set(xlabel="step", ylabel="|f(z) - z| / |f(z)|", title="relative residual")
        edge, start = {"edgecolors": "black", "zorder": 5}, _main(found, found.case.start).tolist()
        third.scatter(*start, s=60, marker="s", color="#56B4E9", label="start", **edge)
        third.scatter(0, 0, s=180, marker="*", color="#E69F00", label="equilibrium", **edge)
        third.set(xlabel="first main direction (R)", ylabel="second main direction (R)")
        _at_least(third)
        third.set_title(f"paths ({100 * found.explained:.0f} % in this plane)")
        for axes in panels:
            axes.grid(color="0.9")
            axes.title.set_fontsize(10)
            axes.tick_params(labelsize=8)
        for axes in (first, second):
            axes.xaxis.get_major_locator().set_params(nbins=8, integer=True)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        figure.suptitle(title, fontsize=11)


def _path_label(path: SolverPath, found: Trajectories) -> str:
    rtol = found.case.solver.rtol
    steps = path.num_steps(rtol)
    name = "plain steps" if path.mode == "picard" else path.mode
    where = "" if path.ends_at_equilibrium else ", ends elsewhere"
    if steps is None:
        return f"{name}: not at {rtol:g} in {len(path.energy) - 1} steps{where}"
    return f"{name}: {steps} {'step' if steps == 1 else 'steps'} to {rtol:g}{where}"


def _draw_slopes(axes: Any, found: Trajectories) -> None:
    """What plain steps do at worst (the certificate) and near the equilibrium, and where the model stops."""
    plain = next(path for path in found.paths if path.mode == "picard")
    first, n = plain.residual[0].item(), len(plain.residual)
    certified = (found.certificate, "#CC79A7", "certified factor")
    for factor, colour, name in (certified, (found.contraction, "#999999", "factor at the equilibrium")):
        if 0 < factor < 1:
            line = [first * factor**step for step in range(n) if first * factor**step > LOWEST_SHOWN]
            axes.semilogy(line, color=colour, linestyle="--", label=f"{name}: {factor:.2g} per step")
    rtol = found.case.solver.rtol
    axes.axhline(rtol, color="#56B4E9", linewidth=1, label=f"the model stops at {rtol:g}")


def _at_least(axes: Any) -> None:
    """A range of the second direction that is not below a tenth of the first's: a straight path looks straight."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    short = max(0.0, 0.1 * (right - left) - (high - low)) / 2
    axes.set_ylim(low - short, high + short)


def _main(found: Trajectories, z: Tensor) -> Tensor:
    """Coordinates along the paths' main directions, the second 0 where there is but one."""
    return flat(z - found.case.z, found.axes) / found.case.radius


def plot_basins(found: Basins, file: Path, *, title: str, points: Sequence[CriticalPoint] = ()) -> None:
    """Which attractor each start of the plane ends in, and after how many steps; of ``points``, saddles are marked."""
    ticks, n = _ticks(found), len(found.attractors)
    fewest = torch.quantile(found.num_steps.double().flatten(), 0.005).item()  # not those at rest
    with saved_figure(file, TALL, few_colours=True) as figure:
        from matplotlib.ticker import MaxNLocator

        left, right = figure.subplots(1, 2)
        draw_basins(left, found)
        mesh = {"shading": "nearest", "rasterized": True}
        steps = right.pcolormesh(ticks, ticks, found.num_steps.tolist(), cmap="cividis", vmin=fewest, **mesh)
        bar = _colour_bar(figure, steps, right, "plain steps to a residual of 1e-8")
        bar.locator = MaxNLocator(8, integer=True)
        ends = "every start ends in one place" if n == 1 else f"starts by where they end: {n} attractors"
        left.set_title(ends, fontsize=10)
        right.set_title("how long they take", fontsize=10)
        for axes in (left, right):
            draw_plane(axes, found)
        _draw_saddles(left, found, points)
        handles, labels = left.get_legend_handles_labels()
        patches, names = basin_legend(found)
        shown_as = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "facecolor": "0.85"}
        figure.legend(handles + patches, labels + names, **shown_as)
        figure.suptitle(title, fontsize=11)


def draw_basins(axes: Any, found: Basins) -> None:
    """Each start in the colour of the attractor that it ends in; black where it does not converge."""
    from matplotlib.colors import ListedColormap

    ticks, own = _ticks(found), ListedColormap(["black", *COLOURS])
    shown = torch.where(found.converged, found.label.clamp(max=LAST), torch.tensor(-1)) + 1
    style = {"cmap": own, "vmin": 0, "vmax": own.N, "shading": "nearest", "rasterized": True}
    axes.pcolormesh(ticks, ticks, shown.tolist(), **style)


def _draw_saddles(axes: Any, found: Basins, points: Sequence[CriticalPoint]) -> None:
    saddles = [point.z for point in points if point.kind == "saddle"]
    near = [z for z in saddles if found.plane.distance(z) < SAME * found.case.radius]
    if near:
        places = found.plane.coordinates(torch.stack(near)) / found.case.radius
        style = {"s": 60, "marker": "X", "color": "white", "edgecolors": "black", "zorder": 4}
        axes.scatter(*places.T.tolist(), label="saddles in the plane", **style)


def basin_legend(found: Basins) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    named = [
        (colour, f"{place_name(found.case, point)}: {100 * share:.0f} %")
        for colour, point, share in zip(COLOURS, found.attractors, found.shares, strict=False)
    ]
    if len(found.attractors) > len(COLOURS):
        more = f"{len(found.attractors) - LAST} more: {100 * sum(found.shares[LAST:]):.0f} %"
        named[LAST] = (COLOURS[LAST], more)
    if not found.converged.all():
        named.append(("black", "not converged"))
    return [Patch(color=colour) for colour, _ in named], [name for _, name in named]


def place_name(case: TokenCase, point: CriticalPoint) -> str:
    """What an attractor is called: by the pattern that it retrieves, if there is one."""
    if (point.z - case.z).norm() < SAME * case.radius:
        return "this equilibrium, E 0"
    name = f"retrieves pattern {point.pattern}" if point.pattern_weight > 0.5 else "retrieves a mixture"
    if point.kind == "saddle":
        name = f"a saddle, {name}"
    return f"{name}, E {point.energy:+.2g}"


def plot_memory(found: MemoryOrganisation, file: Path, *, title: str) -> None:
    """Where patterns and equilibria lie, how alike patterns are, and how much each is used."""
    usage = found.usage * len(found.usage)
    with saved_figure(file, WIDE, few_colours=True) as figure:
        first, second, third = figure.subplots(1, 3)
        colours = usage.clamp(min=1e-3).log10().tolist()
        places = found.coordinates.T.tolist()
        points = first.scatter(*places, c=colours, s=12, cmap="cividis", label="patterns")
        _colour_bar(figure, points, first, "log10 usage (0: the mean)")
        crosses = {"s": 30, "marker": "x", "color": "#D55E00", "linewidths": 1}
        first.scatter(*found.equilibria.T.tolist(), label="equilibria", **crosses)
        first.set(xlabel="first main direction", ylabel="second main direction")
        first.set_title(f"patterns: the plane holds {100 * found.explained:.0f} %", fontsize=10)
        image = second.imshow(found.cosine.tolist(), cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
        _colour_bar(figure, image, second, "cosine")
        second.set(xlabel=f"{len(found.cosine)} most used patterns", ylabel="the same")
        second.set_title(f"likeness: at most {found.largest_cosine:.2f}", fontsize=10)
        third.plot(range(1, len(usage) + 1), usage.sort(descending=True).values.tolist(), color="#0072B2")
        third.axhline(1, color="#999999", linestyle="--", linewidth=1, label="all used alike")
        third.set(xlabel="rank of the pattern", ylabel="usage (1: the mean)", yscale="log")
        alike, by_one = math.exp(found.usage_entropy), math.exp(found.token_entropy)
        third.set_title(f"in use: {alike:.0f} patterns, {by_one:.1f} by a token", fontsize=10)
        third.grid(color="0.9")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        margin = f"retrieval margin {found.margin:.1f} nats (3 and more retrieve reliably)"
        figure.suptitle(f"{title}\n{margin}", fontsize=11)
