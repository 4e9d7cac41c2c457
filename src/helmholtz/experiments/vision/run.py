"""A small vision transformer whose mixer is attention or FEM, at equal parameters, on small images.

The learning rate comes from a pilot on the validation images of the digits, and serves Fashion-MNIST as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_choices
from helmholtz.experiments.queue import QueuedRun
from helmholtz.experiments.vision.data import Images, ImageSplits
from helmholtz.experiments.vision.models import ViT, ViTConfig
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.base import evaluation_mode
from helmholtz.models.encoder import MixerName
from helmholtz.training.config import TrainConfig
from helmholtz.training.fit import fit_examples
from helmholtz.training.loop import seed_everything

LEARNING_RATES = {"attention": 3e-3, "fem": 3e-3}
BATCH_SIZE = 500
"""Images that are evaluated at once."""

Measured = Literal["validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionRecipe:
    """Sizes of a model and its training but for the learning rate: the same for both mixers."""

    patch_size: int
    n_layers: int
    steps: int
    eval_every: int
    d_model: int = 64
    n_heads: int = 4
    d_ff: int = 128
    batch_size: int = 64
    patience: int = 4
    """Evaluations without a better validation loss that end the training."""
    warmup_steps: int = 50
    weight_decay: float = 0.05
    dropout: float = 0.1

    def model_config(self, data: ImageSplits, mixer: MixerName) -> ViTConfig:
        return ViTConfig(
            image_size=data.train.pixels.shape[-1], patch_size=self.patch_size, n_classes=len(data.classes),
            mixer=mixer, d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads, d_ff=self.d_ff,
            dropout=self.dropout,
        )  # fmt: skip

    def train_config(self, lr: float, seed: int) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, lr=lr, warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay, eval_every=self.eval_every, seed=seed,
        )  # fmt: skip


DIGITS = VisionRecipe(patch_size=2, n_layers=2, steps=600, eval_every=60)
LARGER = VisionRecipe(patch_size=4, n_layers=3, steps=1500, eval_every=250)
"""1,500 batches of 64 are 1.75 epochs of Fashion-MNIST: what two cores reach, not what the model could learn."""


def recipe_of(data: ImageSplits) -> VisionRecipe:
    """By the size of the images: below 16 pixels along a side that of the digits."""
    return DIGITS if data.train.pixels.shape[-1] < 16 else LARGER


def vision_runs(
    data: Sequence[ImageSplits],
    models: Sequence[str],
    seeds: Sequence[int],
    *,
    measured: Measured = "test",
    lrs: Sequence[float | None] = (None,),
) -> list[QueuedRun]:
    """The queue: every mixer and seed on every set of images.

    Args:
        measured: "validation" leaves the test images alone.
        lrs: in place of ``LEARNING_RATES``, for a pilot; None is the rate there.

    Raises: ValueError for unknown mixers, negative seeds, or sets of one name.
    """
    check_choice("measured", measured, get_args(Measured))
    names = [one.name for one in data]
    check(len(set(names)) == len(names), "data", names, "sets whose names differ")
    check_choices("models", models, LEARNING_RATES)
    return [
        _run(one, model, seed, measured, lr)
        for one in data
        for seed in seeds
        for model in models
        for lr in lrs
    ]


def _run(one: ImageSplits, model: str, seed: int, measured: Measured, lr: float | None) -> QueuedRun:
    name = f"{one.name}-{model}-{seed}" + ("" if lr is None else f"-lr{lr:g}")
    counts = {part: len(getattr(one, part)) for part in ("train", "validation", "test")}
    settings = {
        "data": {"name": one.name, "sha256": one.sha256, "classes": list(one.classes), **counts},
        "model": model,
        "seed": seed,
        "measured": measured,
        "lr": LEARNING_RATES[model] if lr is None else lr,
        "recipe": asdict(recipe_of(one)),
    }
    return QueuedRun(name, settings)


def compute_vision(run: QueuedRun, data: Mapping[str, ImageSplits]) -> dict[str, Any]:
    """Train the model of a run and measure it.

    Returns: parameters, the learning curve, loss and accuracy on the validation images and, where they are measured, on
        the test images, with counts by true (row) and predicted (column) class.
    """
    settings = run.settings
    one, seed = data[settings["data"]["name"]], settings["seed"]
    recipe = VisionRecipe(**settings["recipe"])
    seed_everything(seed)
    model = ViT(recipe.model_config(one, settings["model"]))

    def loss(batch: Int[Tensor, "n"]) -> Float[Tensor, ""]:
        return F.cross_entropy(model(one.train.pixels[batch]), one.train.labels[batch])

    found = fit_examples(
        model, recipe.train_config(settings["lr"], seed), len(one.train), loss,
        lambda: measure(model, one.validation)["loss"], patience=recipe.patience,
    )  # fmt: skip
    result: dict[str, Any] = {
        "parameters": count_parameters(model),
        "steps": found.steps,
        "best_step": found.best.step,
        "curve": [[point.step, point.train, point.validation] for point in found.curve],
        "validation": measure(model, one.validation),
    }
    if settings["measured"] == "test":
        result["test"] = measure(model, one.test)
        result["confusion"] = confusion(model, one.test, len(one.classes)).tolist()
    return result


def measure(model: ViT, images: Images) -> dict[str, float]:
    """Mean cross-entropy in nats, and the fraction of images whose class is the most likely one."""
    logits = predict(model, images)
    right = (logits.argmax(-1) == images.labels).sum().item()
    return {"loss": F.cross_entropy(logits, images.labels).item(), "accuracy": right / len(images)}


def confusion(model: ViT, images: Images, n_classes: int) -> Int[Tensor, "true predicted"]:
    """Numbers of images by their class and by the most likely one."""
    pairs = images.labels * n_classes + predict(model, images).argmax(-1)
    return pairs.bincount(minlength=n_classes**2).view(n_classes, n_classes)


def predict(model: ViT, images: Images) -> Float[Tensor, "N classes"]:
    with evaluation_mode(model):
        return torch.cat([model(batch) for batch in images.pixels.split(BATCH_SIZE)])
