"""Charts as inline SVG that takes the colour of the text around it, for light and dark pages."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helmholtz.evals.plots import own_style

INK = "#123456"
"""Stands for the page's text colour until the SVG is written out."""
SIZE = (5.2, 3.5)
COLOURS = (
    "#3b82f6",
    "#f59e0b",
    "#10b981",
    "#ef4444",
    "#8b5cf6",
    "#0ea5e9",
    "#d946ef",
    "#84cc16",
    "#94a3b8",
    "#f97316",
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "helmholtz",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 10,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one legend entry."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    colour: int | None = None
    """Number of the colour; None takes the next."""


def line_chart(
    curves: Sequence[Curve], *, x: str, y: str, log_x: bool = False, log_y: bool = False, title: str = ""
) -> str:
    """Curves over a common axis; those of one name and colour share an entry of the legend."""

    def draw(axes: Any) -> None:
        named = set[str]()
        for place, curve in enumerate(curves):
            colour = COLOURS[(place if curve.colour is None else curve.colour) % len(COLOURS)]
            text = None if curve.name in named else curve.name
            named.add(curve.name)
            axes.plot(curve.x, curve.y, curve.style, color=colour, markersize=4, linewidth=1.4, label=text)
        if log_x:
            _logarithmic(axes, "x")
        if log_y:
            _logarithmic(axes, "y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        columns = 2 if len(named) > 3 else 1
        axes.figure.legend(loc="outside lower center", ncols=columns, fontsize=8)

    return svg_of(draw, SIZE)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[float]]], *, x: str, log_x: bool = False, title: str = ""
) -> str:
    """A row per name: a mark per value, and a stroke at their mean."""

    def draw(axes: Any) -> None:
        for place, (_, values) in enumerate(rows):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(values, [place] * len(values), "o", color=colour, fillstyle="none", markersize=6)
            axes.plot(
                [sum(values) / len(values)], [place], "|", color=colour, markersize=15, markeredgewidth=2
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if log_x:
            _logarithmic(axes, "x")
        axes.set_xlabel(x)
        axes.set_title(title)

    return svg_of(draw, (SIZE[0], 1.1 + 0.28 * len(rows)))


def heat_charts(
    panels: Sequence[tuple[str, Sequence[Sequence[float]]]],
    *,
    x: str,
    y: str,
    marks: Sequence[Sequence[int]] = (),
) -> str:
    """Matrices side by side with one scale from 0 to 1; ``marks`` circle a column in each row of each panel."""

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        for place, (name, matrix) in enumerate(panels):
            own = figure.add_subplot(1, len(panels), place + 1)
            own.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            if marks:
                own.scatter(
                    marks[place], range(len(marks[place])), s=22, facecolors="none", edgecolors="#ffffff"
                )
            own.grid(visible=False)
            for axis in (own.xaxis, own.yaxis):
                axis.get_major_locator().set_params(integer=True)
            own.set_title(name, fontsize=8)
            own.set_xlabel(x)
            own.set_ylabel(y if place == 0 else "")

    return svg_of(draw, (SIZE[0], 2.7))


def _logarithmic(axes: Any, name: str) -> None:
    """A logarithmic axis with 1, 2 and 5 of each power of ten written out as numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,g}")


def svg_of(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """What ``draw`` makes of a pair of axes, of ``size`` inches, in the page's colours."""
    with own_style():
        from matplotlib import style
        from matplotlib.figure import Figure

        style.use(STYLE)
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing, transparent=True)
    text = written.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for side in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
