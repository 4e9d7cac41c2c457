"""Made-up series for the tests of forecasting."""

import math
from dataclasses import replace
from datetime import datetime, timedelta

import torch

from helmholtz.experiments.forecasting.data import Series
from helmholtz.experiments.forecasting.run import RECIPES


def waves(n_rows=700, n_variates=3, *, name="waves"):
    """Daily waves of several phases under a little noise, hourly."""
    generator = torch.Generator().manual_seed(5)
    hours = torch.arange(n_rows, dtype=torch.float64).unsqueeze(1)
    phases = torch.arange(n_variates, dtype=torch.float64)
    values = (2 * math.pi * hours / 24 + phases).sin() * (phases + 1)
    values = values + 0.1 * torch.randn(n_rows, n_variates, generator=generator, dtype=torch.float64)
    variates = tuple(f"v{i}" for i in range(n_variates))
    return Series(name, datetime(2020, 1, 1), timedelta(hours=1), variates, variates[-1], values)


def shorten(monkeypatch):
    """Let forecasters be trained for four steps."""
    for name, recipe in RECIPES.items():
        if recipe is not None:
            short = replace(recipe, steps=4, eval_every=2, warmup_steps=1, batch_size=4)
            monkeypatch.setitem(RECIPES, name, short)


def write_csv(series, file):
    """The series in the format of ETT."""
    lines = [",".join(("date", *series.variates))]
    for i, row in enumerate(series.values.tolist()):
        lines.append(",".join([str(series.start + i * series.step), *map(repr, row)]))
    file.write_text("\n".join(lines) + "\n")
