"""The language study: six models of equal parameters on two texts, by bytes and by BPE, and three sizes on one of them.

Each run trains with the library's loop in a folder that is thrown away, and is measured on the same tokens of the
validation split as all others: cross-entropy, or for the Free Transformer the mixture bound.
"""

import functools
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from helmholtz._checks import check, check_choice, check_choices
from helmholtz._files import write_json
from helmholtz._run_folder import LAST
from helmholtz.data.king_james import king_james
from helmholtz.data.prepare import DataConfig, PreparedData, prepare
from helmholtz.data.texts import prepare_texts
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.evals.language import stream_nats, text_stream
from helmholtz.evals.latent import bounds_per_byte, evaluate_bounds
from helmholtz.experiments.language.models import LANGUAGE_MODELS, SIZES, model_config
from helmholtz.experiments.queue import SEEDS, FinishedRun, QueuedRun, runs_of, values_of
from helmholtz.experiments.records import TIMINGS
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.training.callbacks import Callback, EvalRecord, StepRecord
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.run import train

CORPORA = ("shakespeare", "king_james")
TOKENIZERS: tuple[Literal["bytes", "bpe"], ...] = ("bytes", "bpe")
VOCAB_SIZE = 1024
"""Of the BPE."""
SCALED_MODELS = ("baseline", "fem_softmax", "mamba")
SCALED_SIZES = ("s", "l")
"""Beside "m", which the rest of the study has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageStudy:
    """Settings that all runs share."""

    steps: int = 300
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 4e-3
    warmup_steps: int = 30
    min_lr_ratio: float = 0.05
    eval_every: int = 50
    eval_tokens: int = 8192
    """Of the learning curve."""
    measured_tokens: int = 32_768
    """Of the final number, from the start of the validation split."""
    plans: int = 8
    """Plans per window, read from the text, in the Free Transformer's bound; four of the prior beside them."""


def language_runs(
    study: LanguageStudy,
    *,
    corpora: Sequence[str] = CORPORA,
    tokenizers: Sequence[str] = TOKENIZERS,
    models: Sequence[str] = tuple(LANGUAGE_MODELS),
    seeds: Sequence[int] = SEEDS,
) -> list[QueuedRun]:
    """Each seed whole before the next, and of a seed the scaling strip last.

    Raises: ValueError for unknown names.
    """
    check_choices("corpora", corpora, CORPORA)
    check_choices("tokenizers", tokenizers, TOKENIZERS)
    check_choices("models", models, LANGUAGE_MODELS)
    runs = []
    for seed in seeds:
        grid = [(c, t, "m", m) for c in corpora for t in tokenizers for m in models]
        if "shakespeare" in corpora and "bytes" in tokenizers:
            scaled = [m for m in SCALED_MODELS if m in models]
            grid += [("shakespeare", "bytes", size, m) for size in SCALED_SIZES for m in scaled]
        runs += [_run(study, *point, seed) for point in grid]
    return runs


def _run(
    study: LanguageStudy, corpus: str, tokenizer: str, size: str, model: str, seed: int
) -> QueuedRun:  # fmt: skip
    vocab_size = 257 if tokenizer == "bytes" else VOCAB_SIZE
    config = model_config(model, SIZES[size], vocab_size=vocab_size, max_seq_len=study.seq_len)
    settings = {
        "corpus": corpus,
        "tokenizer": tokenizer,
        "size": size,
        "model": model,
        "config": json.loads(json.dumps(config.to_dict())),
        "seed": seed,
        **asdict(study),
    }
    return QueuedRun(f"{corpus}-{tokenizer}-{size}-{model}-{seed}", settings)


@functools.cache
def prepare_corpus(corpus: str, tokenizer: Literal["bytes", "bpe"], folder: Path) -> PreparedData:
    """Tokens of a corpus in a folder of their own below ``folder``, made once.

    Raises: ImportError or FileNotFoundError with the command that installs the text.
    """
    check_choice("corpora", corpus, CORPORA)
    config = DataConfig(
        folder=str(folder / f"{corpus}-{tokenizer}"),
        tokenizer=tokenizer,
        vocab_size=None if tokenizer == "bytes" else VOCAB_SIZE,
    )
    return prepare(config) if corpus == "shakespeare" else prepare_texts(config, [king_james()])


class Curve(Callback):
    """Validation losses and, apart from them, CPU seconds of the training steps before each but the first step.

    What comes before the end of the first step is left out: reading the text, making the model, warming up.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self._spent, self._mark = 0.0, math.nan

    def on_step(self, record: StepRecord) -> None:
        now = time.process_time()
        if not math.isnan(self._mark):
            self._spent += now - self._mark
        self._mark = now

    def on_eval(self, record: EvalRecord) -> None:
        point = {
            "step": record.step,
            "tokens": record.tokens,
            "bits_per_byte": record.validation_bits_per_byte,
        }
        self.points.append(point)
        self.seconds.append(round(self._spent, 3))
        self._mark = time.process_time()


def compute_language(run: QueuedRun, *, data: Path, folder: Path) -> dict[str, Any]:
    """Train and measure one model; CPU seconds at the points of its curve go beside the timing of the run.

    Raises: RuntimeError if training was stopped by a signal: what it had is no result.
    """
    s, curve = run.settings, Curve()
    prepared = prepare_corpus(s["corpus"], s["tokenizer"], data)
    with tempfile.TemporaryDirectory() as scratch:
        result = train(run_config(run, prepared, Path(scratch) / "run"), callbacks=[curve])
        if result.status != "finished":
            raise RuntimeError(
                f"{run.name} was {result.status} at step {result.step}; the same command begins it anew"
            )
        model = load_checkpoint(result.folder / LAST)
    write_json(folder / TIMINGS / f"{run.name}.curve.json", {"cpu_seconds": curve.seconds})
    return {
        "parameters": count_parameters(model),
        "tokens": result.tokens,
        "fingerprint": prepared.metadata.fingerprint,
        "curve": curve.points,
        **quality(model, prepared.validation, s["measured_tokens"], s["seq_len"], s["plans"]),
    }


def run_config(run: QueuedRun, prepared: PreparedData, folder: Path) -> RunConfig:
    """The library's description of a run."""
    s = run.settings
    row = LANGUAGE_MODELS[s["model"]]
    config = model_config(
        s["model"], SIZES[s["size"]], vocab_size=prepared.metadata.vocab_size, max_seq_len=s["seq_len"]
    )
    return RunConfig(
        architecture=row.architecture,
        model=config,
        data=DataConfig(folder=str(prepared.folder), **_data_settings(prepared)),
        train=TrainConfig(
            output_dir=str(folder), steps=s["steps"], batch_size=s["batch_size"], seq_len=s["seq_len"], lr=s["lr"],
            warmup_steps=s["warmup_steps"], min_lr_ratio=s["min_lr_ratio"], eval_every=s["eval_every"],
            eval_tokens=s["eval_tokens"], save_every=s["steps"], seed=s["seed"], device="cpu",
        ),
    )  # fmt: skip


def _data_settings(prepared: PreparedData) -> dict[str, Any]:
    return dict(prepared.metadata.settings)


def quality(model: Decoder, data: TokenDataset, n_tokens: int, seq_len: int, plans: int) -> dict[str, Any]:
    """Bits per byte of the first ``n_tokens`` of a split; of a model with a plan also the other bounds."""
    stream = text_stream(data)[: n_tokens + 1]
    if model.plan is None:
        nats = stream_nats(model, stream, seq_len=seq_len, overlap=0)
        bits = bits_per_byte(nats, data.count_bytes(stream[1:]))
        return {"kind": "exact", "bits_per_byte": bits, "bounds": None}
    found = evaluate_bounds(model, stream, seq_len=seq_len, n_samples=plans, count_bytes=data.count_bytes)
    bounds = bounds_per_byte(found)
    bounds["kl_bits_per_token"] = found.kl / math.log(2)
    return {"kind": "bound", "bits_per_byte": bounds["mixture_weighted"], "bounds": bounds}


def scaling_fits(done: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    r"""For each scaled model the line :math:`a + b \log_{10} N` through the bits per byte of its three sizes.

    ``standard_error`` is that of the slope from the residuals of the fit, sizes and seeds alike: what a straight line
    leaves is in it. Models with fewer than three sizes are left out.
    """
    fits = []
    for model in SCALED_MODELS:
        found = runs_of(done, model=model, corpus="shakespeare", tokenizer="bytes")
        if len(values_of(found, "size")) < len(SIZES):
            continue
        x = np.log10([run.result["parameters"] for run in found])
        y = np.array([run.result["bits_per_byte"] for run in found])
        slope, error = fit_slope(x, y)
        fits.append({"model": model, "slope": slope, "standard_error": error, "runs": len(found)})
    return fits


def fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error. Raises: ValueError for fewer than three points."""
    check(len(x) >= 3, "points", len(x), "at least three")
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx * dx).sum())
    left = y - y.mean() - slope * dx
    variance = (left * left).sum() / (len(x) - 2)
    return slope, float(math.sqrt(variance / (dx * dx).sum()))
