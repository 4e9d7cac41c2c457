"""A figure of which samples share what: groups under independent plans above groups under one plan each."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.evals.plans import Group, PlanComparison, agreement, padded
from helmholtz.evals.plots import saved_figure, visible

CELL, ROW = 0.17, 0.24
"""Inches of a token and of a sample."""
WIDEST = 24.0
SHOWN_TEXT = 110
"""Tokens of a row up to which each cell spells its token."""


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """Samples to be shown together."""

    name: str
    samples: Group
    is_shared: bool
    """Under one plan."""


def companions(samples: Group) -> Float[Tensor, "n T"]:
    """For each token, the part of the group's other samples with the same token there; NaN after a sample's end."""
    tokens = padded([sample.tokens for sample in samples])
    same = (tokens.unsqueeze(0) == tokens.unsqueeze(1)).sum(0)
    return torch.where(tokens >= 0, (same - 1) / (len(tokens) - 1), torch.nan)


def plot_plans(
    groups: Sequence[NamedGroup],
    comparison: PlanComparison,
    file: Path,
    *,
    title: str,
    n_prompt: int,
    spell: Callable[[int], str],
) -> None:
    """Draw each sample of ``groups`` as a row, its tokens darker the more of its group have them at this position.

    Blue groups have a plan per sample, green ones one plan. Below, the agreement along the text, over all groups of
    the comparison. Positions count from the first of the ``n_prompt`` tokens of the prompt, as codes of a plan do.
    """
    longest = max(1, max(len(sample.tokens) for group in groups for sample in group.samples))
    heights = [ROW * len(group.samples) for group in groups] + [1.3]
    size = min(WIDEST, max(7.0, CELL * longest + 1.2)), sum(heights) + 0.45 * len(heights) + 0.8
    with warnings.catch_warnings(), saved_figure(file, size) as figure:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box, as it should be
        *panels, last = figure.subplots(len(heights), height_ratios=heights, sharex=True)
        for axes, group in zip(panels, groups, strict=True):
            _draw_group(axes, group, n_prompt, spell if longest <= SHOWN_TEXT else None)
        _draw_curves(last, comparison, n_prompt)
        last.set_xlim(n_prompt - 0.5, n_prompt + longest - 0.5)
        what = "darker: more samples of the group have this token here"
        figure.suptitle(f"{visible(title)}\n{what}", fontsize=9)


def _draw_group(axes: Any, group: NamedGroup, n_prompt: int, spell: Callable[[int], str] | None) -> None:
    shade = companions(group.samples)
    n, length = shade.shape
    extent = (n_prompt - 0.5, n_prompt + length - 0.5, n - 0.5, -0.5)
    colours = "Greens" if group.is_shared else "Blues"
    axes.set_facecolor("0.85")  # after a sample's end
    if length:
        axes.imshow(shade.tolist(), aspect="auto", cmap=colours, vmin=0, vmax=1.3, extent=extent)
    if spell is not None:
        for row, sample in enumerate(group.samples):
            for place, token in enumerate(sample.tokens, n_prompt):
                style = {"ha": "center", "va": "center", "fontsize": 6, "family": "monospace"}
                axes.text(place, row, _short(spell(token)), **style)
    axes.set_yticks([])
    kind = "one plan" if group.is_shared else "a plan each"
    share = f"two samples have {100 * agreement(group.samples):.0f} % of their tokens in common"
    axes.set_title(f"{group.name} ({kind}): {share}", fontsize=8, loc="left")


def _short(text: str) -> str:
    text = visible("".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text))
    return text if len(text) <= 2 else f"{text[0]}\N{HORIZONTAL ELLIPSIS}"


def _draw_curves(axes: Any, comparison: PlanComparison, n_prompt: int) -> None:
    curves = [("one plan", comparison.sharing, "C2"), ("a plan each", comparison.independent_sharing, "C0")]
    for name, sharing, colour in curves:
        places = range(n_prompt, n_prompt + len(sharing.curve))
        axes.plot(places, sharing.curve, color=colour, linewidth=1, label=name)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("position in the text (0: the prompt's first token)", fontsize=8)
    axes.set_ylabel("agreement", fontsize=8)
    axes.set_title(f"pairs of samples, {len(comparison.shared)} groups of each kind", fontsize=8, loc="left")
    axes.legend(fontsize=7, loc="upper right")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
