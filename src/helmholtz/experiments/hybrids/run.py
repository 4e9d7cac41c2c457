"""A plan over FEM against a plan over attention, and an equilibrium over FEM-GLA against one over Mamba.

Letters are trained and measured as in the letters study at its small size. Models of Shakespeare train with the
library's loop in a folder that is thrown away, and are measured on the same tokens of the validation split, with the
last weights: nothing is chosen on them.
"""

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helmholtz._checks import check_choices
from helmholtz._run_folder import LAST
from helmholtz.data.prepare import DataConfig, PreparedData, prepare
from helmholtz.evals.plans import compare_plans
from helmholtz.experiments.hybrids.models import CONTROLS, TEXT_MODELS, PlannedMixer, letter_model
from helmholtz.experiments.language.run import quality
from helmholtz.experiments.letters.report import kappa_label, measure_letters
from helmholtz.experiments.letters.run import PROFILES, train_on_letters
from helmholtz.experiments.queue import SEEDS, QueuedRun
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.models.sampling import SamplingSettings
from helmholtz.training.callbacks import Callback, EvalRecord
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.free_bits import FreeBitsConfig
from helmholtz.training.run import train

PARTS = ("letters", "plan", "equilibrium")
LETTERS = "ci"
"""Profile of the letters study."""
LETTER_MIXERS: tuple[PlannedMixer, ...] = ("attention", "fem")
KAPPAS = (None, 1 / 4, 1.0)
"""Free bits per token of letters: no plan, enough for the place of the run, enough for some of its noise."""
VOCAB_SIZE = 2048
PROMPT = "KING HENRY.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """How the models of a part are trained and measured."""

    steps: int
    lr: float
    kappa_bits: float = 0.5
    """Free bits per token of a plan."""
    batch_size: int = 8
    seq_len: int = 128
    warmup_steps: int = 50
    min_lr_ratio: float = 0.05
    eval_tokens: int = 8192
    """Of the two evaluations, in the middle and at the end."""
    measured_tokens: int = 32_768
    """Of the final number, from the start of the validation split."""
    plans: int = 8
    """Plans per window, read from the text, in the bound; four of the prior beside them."""
    groups: int = 16
    """Groups of samples under one plan, and as many under a plan each."""
    group_size: int = 5
    sampled_tokens: int = 48


TEXT_SETTINGS = {
    "plan": TextSettings(steps=400, lr=1e-3),
    "equilibrium": TextSettings(steps=200, lr=4e-3),
}
"""The rates of the committed baselines: of ``shakespeare_plans``, for at the demo's no plan is used, and the demo's."""


def hybrid_runs(*, parts: Sequence[str] = PARTS, seeds: Sequence[int] = SEEDS) -> list[QueuedRun]:
    """Each seed whole before the next, and what is neither plan nor equilibrium in question after all others.

    Raises: ValueError for unknown names.
    """
    check_choices("parts", parts, PARTS)
    runs = []
    for seed in seeds:
        if "letters" in parts:
            runs += [_letter_run(mixer, kappa, seed) for kappa in KAPPAS for mixer in LETTER_MIXERS]
        runs += [_text_run(name, seed) for name, model in TEXT_MODELS.items() if model.part in parts]
    return sorted(runs, key=lambda run: _is_control(run.settings))


def _is_control(settings: Mapping[str, Any]) -> bool:
    if settings["part"] == "letters":
        return settings["kappa_bits"] is None
    return settings["model"] in CONTROLS


def _letter_run(mixer: PlannedMixer, kappa_bits: float | None, seed: int) -> QueuedRun:
    experiment = PROFILES[LETTERS]
    config = letter_model(mixer, experiment, planned=kappa_bits is not None)
    settings = {"part": "letters", "model": mixer, "kappa_bits": kappa_bits, "seed": seed, "config": config.to_dict(),
                "experiment": asdict(experiment)}  # fmt: skip
    kappa = kappa_label(kappa_bits).replace(" ", "_").replace("/", "_")
    return QueuedRun(f"letters-{mixer}-{kappa}-{seed}", json.loads(json.dumps(settings)))


def _text_run(name: str, seed: int) -> QueuedRun:
    model = TEXT_MODELS[name]
    text = TEXT_SETTINGS[model.part]
    config = model.config(vocab_size=VOCAB_SIZE, max_seq_len=2 * text.seq_len)
    settings = {"part": model.part, "model": name, "seed": seed, "config": config.to_dict(), **asdict(text)}
    return QueuedRun(f"shakespeare-{name}-{seed}", json.loads(json.dumps(settings)))


@functools.cache
def prepare_shakespeare(folder: Path) -> PreparedData:
    """The demo's tokens, made once. Raises: ImportError with the command that installs the text."""
    return prepare(DataConfig(folder=str(folder), vocab_size=VOCAB_SIZE))


def compute_hybrid(run: QueuedRun, *, data: Path) -> dict[str, Any]:
    """Train and measure one model.

    Raises: RuntimeError if training was stopped by a signal: what it had is no result.
    """
    config = DecoderConfig.from_dict(run.settings["config"])
    if run.settings["part"] == "letters":
        return _compute_letters(run, config)
    return _compute_text(run, config, prepare_shakespeare(data))


def _compute_letters(run: QueuedRun, config: DecoderConfig) -> dict[str, Any]:
    s, experiment = run.settings, PROFILES[LETTERS]
    model = train_on_letters(
        experiment, kappa_bits=s["kappa_bits"], seed=s["seed"], build=lambda: Decoder(config)
    )
    found = measure_letters(model, experiment.law, seed=s["seed"])
    return {"parameters": count_parameters(model), **found.to_dict()}


class Evaluations(Callback):
    """The validation losses, and what the last evaluation says of plan or equilibria."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.statistics: dict[str, float] = {}

    def on_eval(self, record: EvalRecord) -> None:
        self.points.append({"step": record.step, "bits_per_byte": record.validation_bits_per_byte})
        self.statistics = record.statistics


def _compute_text(run: QueuedRun, config: DecoderConfig, prepared: PreparedData) -> dict[str, Any]:
    s, evaluations = run.settings, Evaluations()
    with tempfile.TemporaryDirectory() as scratch:
        described = _described(run, config, prepared, Path(scratch) / "run")
        result = train(described, callbacks=[evaluations])
        if result.status != "finished":
            raise RuntimeError(
                f"{run.name} was {result.status} at step {result.step}; the same command begins it anew"
            )
        model = load_checkpoint(result.folder / LAST)
    return {
        "parameters": count_parameters(model),
        "tokens": result.tokens,
        "fingerprint": prepared.metadata.fingerprint,
        "curve": evaluations.points,
        "statistics": evaluations.statistics,
        **quality(model, prepared.validation, s["measured_tokens"], s["seq_len"], s["plans"]),
        "sharing": None if model.plan is None else _sharing(model, prepared, run),
    }


def _described(run: QueuedRun, config: DecoderConfig, prepared: PreparedData, folder: Path) -> RunConfig:
    s = run.settings
    return RunConfig(
        architecture="decoder",
        model=config,
        data=DataConfig(folder=str(prepared.folder), **prepared.metadata.settings),
        train=TrainConfig(
            output_dir=str(folder), steps=s["steps"], batch_size=s["batch_size"], seq_len=s["seq_len"], lr=s["lr"],
            warmup_steps=s["warmup_steps"], min_lr_ratio=s["min_lr_ratio"], eval_every=s["steps"] // 2,
            eval_tokens=s["eval_tokens"], save_every=s["steps"], seed=s["seed"], device="cpu",
        ),
        objective=None if config.plan is None else FreeBitsConfig(kappa_bits=s["kappa_bits"]),
    )  # fmt: skip


def _sharing(model: Decoder, prepared: PreparedData, run: QueuedRun) -> dict[str, Any]:
    """What part of their tokens samples have in common under one plan, and under a plan each."""
    s, tokenizer = run.settings, prepared.tokenizer
    prompt = [tokenizer.eos_id, *tokenizer.encode(PROMPT)]
    settings = SamplingSettings(max_new_tokens=s["sampled_tokens"], seed=s["seed"])
    found = compare_plans(model, prompt, settings, n_samples=s["group_size"], n_plans=s["groups"])
    estimates = {
        "one_plan": found.sharing.agreement,
        "a_plan_each": found.independent_sharing.agreement,
        "gap": found.gap,
    }
    return {name: asdict(estimate) for name, estimate in estimates.items()}
