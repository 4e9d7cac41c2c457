"""Small tasks that an equilibrium model has to learn, each within a minute of one core."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.experiments.equilibrium.data import sample_periodic
from helmholtz.experiments.recall.data import PairTask, sample_pairs
from helmholtz.layers.equilibrium_reading import equilibrium_statistics
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.models.mamba import Mamba, MambaConfig
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.ops.losses import cross_entropy
from helmholtz.solvers import SolverConfig
from helmholtz.solvers.spectrum import local_lipschitz
from helmholtz.training.config import TrainConfig
from helmholtz.training.equilibrium import EquilibriumObjective, EquilibriumObjectiveConfig
from helmholtz.training.loop import Trainer, seed_everything
from helmholtz.training.objectives import last_tokens
from helmholtz.training.sequences import train_on_sequences

EVALUATION_SEED = 1_000_003
"""Added to a model's seed: it is measured on other sequences than it was trained on."""
PERIOD, LETTERS, LENGTH = 4, 16, 33
PAIRS = PairTask(n_pairs=4, n_keys=16, n_values=16)
TARGET = 0.9
"""Of the stability term."""
STABILITY_WEIGHT = 10.0
STRENGTH = 0.3
"""Of the patterns at the start of ``learn_stability``."""
QUANTILE = 0.95
"""Of the tokens' local Lipschitz constants: the mean of squares that the term is leaves single tokens above."""


def small_config(vocab_size: int, **changes: Any) -> MambaHopfieldConfig:
    """Two blocks of width 64 and 64 patterns."""
    sizes: dict[str, Any] = {"d_model": 64, "n_layers": 2, "d_state": 16, "d_head": 16, "n_patterns": 64}
    return MambaHopfieldConfig(vocab_size=vocab_size, max_seq_len=128, **sizes | changes)


def without_equilibrium(config: MambaHopfieldConfig) -> MambaConfig:
    """The same blocks alone."""
    return MambaConfig(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        d_state=config.d_state,
        d_head=config.d_head,
        max_seq_len=config.max_seq_len,
    )


def periodic(n_sequences: int, generator: torch.Generator) -> Int[Tensor, "B T1"]:
    """Words of 4 letters out of 16, repeated 8 times."""
    return sample_periodic(n_sequences, LENGTH, period=PERIOD, vocab_size=LETTERS, generator=generator)


def pairs(n_sequences: int, generator: torch.Generator) -> Int[Tensor, "B T1"]:
    """``k1 v1 ... k4 v4 q v``."""
    tokens, targets = sample_pairs(PAIRS, n_sequences, generator=generator)
    return torch.cat([tokens, targets[:, -1:]], dim=1)


def learn_periods(seed: int, *, convergence_weight: float, steps: int = 150) -> dict[str, float]:
    """Cross-entropy of the letters that can be known, and the solver's mean steps at a tolerance of 1e-6."""
    seed_everything(seed)
    tight = SolverConfig(max_steps=60, rtol=1e-6, energy_rtol=1e-6)
    model = MambaHopfield(small_config(LETTERS, solver=tight))
    n_targets = LENGTH - PERIOD
    settings = EquilibriumObjectiveConfig(convergence_weight=convergence_weight)
    objective = EquilibriumObjective(settings, n_targets=n_targets)
    train_on_sequences(model, periodic, _schedule(seed, steps, batch_size=16), objective=objective)
    tokens = periodic(256, torch.Generator().manual_seed(EVALUATION_SEED + seed))
    with evaluation_mode(model):
        output = model(tokens[:, :-1])
        statistics = equilibrium_statistics(model.equilibrium, [output.equilibrium])
        nats = cross_entropy(output.logits[:, -n_targets:], tokens[:, -n_targets:]).item()
    kept = ("mean_steps", "max_steps", "converged", "start_distance")
    return {"cross_entropy": nats} | {name: statistics[name] for name in kept}


def learn_pairs(seed: int, *, equilibrium: bool, steps: int = 1500) -> dict[str, float]:
    """Accuracy of the value that is asked for, on 4096 fresh sequences, with the equilibrium or the blocks alone."""
    seed_everything(seed)
    config = small_config(PAIRS.vocab_size)
    model: Decoder = MambaHopfield(config) if equilibrium else Mamba(without_equilibrium(config))
    objective = (
        EquilibriumObjective(EquilibriumObjectiveConfig(), n_targets=1) if equilibrium else last_tokens(1)
    )
    train_on_sequences(model, pairs, _schedule(seed, steps, batch_size=64), objective=objective)
    tokens = pairs(4096, torch.Generator().manual_seed(EVALUATION_SEED + seed))
    with evaluation_mode(model):
        hits = model(tokens[:, :-1]).logits[:, -1].argmax(-1) == tokens[:, -1]
    parameters = count_parameters(model)
    return {"accuracy": hits.double().mean().item(), "parameters": float(parameters)}


def learn_bytes(
    seed: int, train: TokenDataset, validation: TokenDataset, *, steps: int = 300
) -> dict[str, float]:
    """Bits per character of validation text, those of its letter frequencies in training, and the solver's steps."""
    seed_everything(seed)
    model = MambaHopfield(small_config(train.vocab_size))
    config = replace(
        _schedule(seed, steps, batch_size=4),
        seq_len=128,
        eval_tokens=len(validation),
    )
    objective = EquilibriumObjective(EquilibriumObjectiveConfig(), seed=seed)
    trainer = Trainer(model, train, validation, config, objective=objective, report=objective.report)
    converged = 1.0
    model.train()
    for _ in range(steps):
        converged = min(converged, 1 - trainer.step().terms["unconverged"])
    record = trainer.evaluate()
    kept = ("mean_steps", "max_steps", "converged", "retrieval_entropy")
    return {
        "bits_per_character": record.validation_bits_per_byte,
        "unigram_bits_per_character": unigram_bits(train, validation),
        "least_converged_in_training": converged,
    } | {name: record.statistics[name] for name in kept}


def unigram_bits(train: TokenDataset, validation: TokenDataset) -> float:
    """Bits per byte of the validation text under the training text's frequencies, every token counted once more."""
    seen, asked = (data.read(torch.tensor([0]), len(data))[0].long() for data in (train, validation))
    counts = torch.bincount(seen, minlength=train.vocab_size).double() + 1
    nats = -(counts / counts.sum()).log()[asked].sum().item()
    return bits_per_byte(nats, validation.count_bytes(asked))


def learn_stability(seed: int, *, stability_weight: float, steps: int = 200) -> dict[str, float]:
    """Local Lipschitz constants before and after training on periods, in the descent regime.

    There nothing but the term limits the strengths; they begin above the target.
    """
    seed_everything(seed)
    config = small_config(
        LETTERS, stability="descent", solver=SolverConfig(max_steps=100), adjoint_on_nonconvergence="ignore"
    )
    model = MambaHopfield(config)
    with torch.no_grad():
        model.equilibrium.dynamics.log_strengths.copy_(torch.tensor([1.0, STRENGTH]).log())
    tokens = periodic(64, torch.Generator().manual_seed(EVALUATION_SEED + seed))
    before = local_constants(model, tokens)
    settings = EquilibriumObjectiveConfig(stability_weight=stability_weight, contraction_target=TARGET)
    n_targets = LENGTH - PERIOD
    objective = EquilibriumObjective(settings, n_targets=n_targets)
    schedule = replace(_schedule(seed, steps, batch_size=16), lr=1e-2)
    train_on_sequences(model, periodic, schedule, objective=objective)
    after = local_constants(model, tokens)
    with evaluation_mode(model):
        nats = cross_entropy(model(tokens[:, :-1]).logits[:, -n_targets:], tokens[:, -n_targets:]).item()
    return {
        "before": before.quantile(QUANTILE).item(),
        "after": after.quantile(QUANTILE).item(),
        "largest_before": before.max().item(),
        "largest_after": after.max().item(),
        "cross_entropy": nats,
    }


def local_constants(model: Decoder, tokens: Int[Tensor, "B T1"]) -> Float[Tensor, "N"]:
    """The Lipschitz constant of each token's map at its equilibrium or at its start, whichever is larger."""
    with evaluation_mode(model):
        found = model(tokens[:, :-1]).equilibrium
        constants = [
            local_lipschitz(found.problem, z, steps=50, generator=torch.Generator().manual_seed(0))
            for z in (found.rows(found.z), found.rows(found.z_init))
        ]
        return torch.stack(constants).amax(0)


def _schedule(seed: int, steps: int, *, batch_size: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=batch_size, lr=3e-3, warmup_steps=min(50, steps - 1), weight_decay=0.01, seed=seed
    )  # fmt: skip
