"""The demo's own figures, as SVG in the colours of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from helmholtz.evals.plots import visible
from helmholtz.experiments.report.charts import COLOURS, INK, SIZE, svg_of

Pictures = Sequence[Sequence[float]]
"""A row of pixels each."""
MAP = "cividis"


def weight_chart(
    rows: Mapping[str, Sequence[float]], columns: Sequence[str], *, x: str = "", unit: str
) -> str:
    """A line of numbers per row, as colours; at most about forty of the columns' names are written."""

    def draw(axes: Any) -> None:
        image = axes.imshow(list(rows.values()), aspect="auto", cmap=MAP, vmin=0, interpolation="nearest")
        axes.set_yticks(range(len(rows)), list(rows))
        every = 1 if len(columns) < 25 else 4
        turned = 60 if max(map(len, columns)) > 2 else 0
        names = [visible(word) for word in columns[::every]]
        axes.set_xticks(
            range(0, len(columns), every), names, rotation=turned, ha="right" if turned else "center"
        )
        axes.set_xlabel(x)
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label=unit)

    return svg_of(draw, (SIZE[0], 1.4 + 0.22 * len(rows)))


def picture_chart(rows: Mapping[str, Pictures]) -> str:
    """Square pictures of numbers from 0 to 1, a line per name."""
    side = round(len(next(iter(rows.values()))[0]) ** 0.5)
    gap = [float("nan")]
    lines: list[list[float]] = []
    for pictures in rows.values():
        for y in range(side):
            lines.append([z for pixels in pictures for z in [*pixels[y * side : (y + 1) * side], *gap]])
        lines.append(gap * len(lines[0]))

    def draw(axes: Any) -> None:
        axes.imshow(lines, cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axes.set_yticks([(side + 1) * place + side / 2 - 0.5 for place in range(len(rows))], list(rows))
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)

    return svg_of(draw, (SIZE[0], 0.2 + 0.42 * len(rows)))


def landscape_chart(found: Mapping[str, Any]) -> str:
    """Level lines of the energy over the basins of its minima, plain steps from some starts, minima and saddles."""
    ticks, energy = found["ticks"], found["energy"]
    top = max(map(max, energy))

    def draw(axes: Any) -> None:
        extent = (ticks[0], ticks[-1], ticks[0], ticks[-1])
        axes.imshow(_basin_colours(found["basin"]), extent=extent, origin="lower", interpolation="nearest")
        levels = [top * (step / 22) ** 2 for step in range(1, 23)]
        axes.contour(ticks, ticks, energy, levels=levels, colors=INK, linewidths=0.6, alpha=0.6)
        for path in found["paths"]:
            axes.plot(*zip(*path, strict=True), ".-", color=INK, linewidth=1.2, markersize=4)
            axes.plot(*path[0], "o", color=INK, fillstyle="none", markersize=6)
        for place, one in enumerate(found["attractors"]):
            name = f"digit {one['pattern']}" if one["weight"] > 0.5 else "a mixture"
            star = {"markersize": 15, "markeredgecolor": INK, "color": COLOURS[place % len(COLOURS)]}
            axes.plot(
                *one["place"], "*", label=f"minimum: {name}, {one['fraction']:.0%} of the starts", **star
            )
        for place, saddle in enumerate(found["saddles"]):
            text = None if place else "saddle"
            axes.plot(*saddle, "X", color="#ffffff", markeredgecolor=INK, markersize=8, label=text)
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="in norms of the patterns")
        axes.grid(visible=False)
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)

    return svg_of(draw, (SIZE[0], 5.4))


def _basin_colours(labels: Sequence[Sequence[int]]) -> list[list[tuple[float, ...]]]:
    def colour(label: int) -> tuple[float, ...]:
        text = COLOURS[label % len(COLOURS)]
        mixed = tuple(int(text[place : place + 2], 16) / 255 for place in (1, 3, 5))
        return (*mixed, 0.35 if label >= 0 else 0.0)

    return [[colour(label) for label in row] for row in labels]
