"""The equilibria of a text as a table: how each was found, and which patterns it retrieves."""

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._notebook.html import CSS, cells, head_cells, heat, note, number, table
from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.solvers import Status

MOST_TOKENS = 64
MOST_PATTERNS = 8
"""Columns: the patterns that this text's tokens weight most."""


@torch.no_grad()
def equilibrium_html(found: Equilibrium) -> str:
    """A row per token of the first text of the batch, up to ``MOST_TOKENS``; pads are left out."""
    n_tokens = found.z.shape[1]
    weights = found.scatter(found.weights(), pad=0.0)[0].double().cpu()
    real = weights.sum(-1) > 0.5
    patterns = weights[real].mean(0).argsort(descending=True)[:MOST_PATTERNS].sort().values
    places = [place for place in range(n_tokens) if real[place]][:MOST_TOKENS]
    steps, residual, energy = (x[0].tolist() for x in (found.num_steps, found.residual, found.energy))
    status, entropy = found.status[0].tolist(), torch.special.entr(weights).sum(-1).exp().tolist()
    heads = ("token", "solver", "steps", "residual", "energy", "patterns read")
    columns = [head_cells(*heads, *(f"pattern {index}" for index in patterns.tolist()))]
    rows = [
        f"<tr>{cells(place, Status(status[place]).name.lower(), steps[place], f'{residual[place]:.1e}')}"
        f"{number(energy[place])}{number(entropy[place], 1)}{_weights(weights[place, patterns])}</tr>"
        for place in places
    ]
    return f"<div><style>{CSS}</style>{table(columns, rows)}{note(_summary(found, len(weights[0])))}</div>"


def _weights(weights: Float[Tensor, "n"]) -> str:
    return "".join(map(heat, weights.tolist()))


def _summary(found: Equilibrium, n_patterns: int) -> str:
    bound, status = found.certificate(), found.solution.status
    n_rows = len(status)
    converged = int((status == int(Status.CONVERGED)).sum())
    unique = "each has one equilibrium" if bound < 1 else "a token may have several equilibria"
    return (
        f"{converged} of {n_rows} tokens converged. The Lipschitz constant of their maps is at most {bound:.2g}: "
        f"{unique}. Cells are percentages of the retrieval weights over {n_patterns} patterns; patterns read is the "
        "exponential of their entropy."
    )
