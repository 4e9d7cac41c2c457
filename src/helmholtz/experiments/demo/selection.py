"""Part of the demo: attention and free energy read a cache from which every channel wants a token of its own."""

from dataclasses import asdict, replace
from typing import Any

from helmholtz.experiments.demo.settings import DemoSettings, Note
from helmholtz.experiments.selection.run import (
    CAPS,
    MAXIMUM_READERS,
    SelectionStudy,
    learn,
    measure_gaps,
)

BETAS = tuple(
    reader.beta for reader in MAXIMUM_READERS.values() if reader.read == "free_energy" and reader.fixed
)


def compute(settings: DemoSettings, note: Note) -> dict[str, Any]:
    """Gaps to the channel's maximum beside the closed form, and trained layers whose values are fixed."""
    study, seed = replace(SelectionStudy(), steps=settings.selection_steps), settings.seed
    note("channel-wise selection: reads of a cache", 0.0)
    betas = [beta for beta in BETAS if beta is not None]
    gaps = measure_gaps(study.maximum.n_tokens, settings.selection_channels, betas, CAPS[-1:], seed=seed)
    readers = {label: reader for label, reader in MAXIMUM_READERS.items() if reader.fixed}
    layers = []
    for place, (label, reader) in enumerate(readers.items()):
        note(f"channel-wise selection: training {label}", place / len(readers))
        found = learn(
            {
                "task": asdict(study.maximum), "reader": asdict(reader), "steps": study.steps,
                "batch_size": study.batch_size, "lr": study.lr, "seed": seed,
            }
        )  # fmt: skip
        layers.append({"label": label, "beta": reader.beta, "read": reader.read, **found})
    return {"n_tokens": study.maximum.n_tokens, "gaps": gaps, "layers": layers}
