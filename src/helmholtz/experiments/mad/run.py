"""The MAD study as a queue: which runs there are, in which order, and what one of them computes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from helmholtz._checks import check, check_choices
from helmholtz.experiments.mad.data import TASKS, MadSetting, baseline, draw, ladder
from helmholtz.experiments.mad.models import MODELS, MadSizes, build_model
from helmholtz.experiments.mad.training import MadProtocol, StepCallback, train
from helmholtz.experiments.queue import FinishedRun, QueuedRun, grouped
from helmholtz.layers.sizing import count_parameters

LR_GRID = (1e-4, 5e-4, 1e-3)
LEARNING_RATES: dict[str, float] = {
    "memorization": 0.001,
    "compression": 0.001,
    "in-context-recall": 0.001,
    "noisy-in-context-recall": 0.001,
    "fuzzy-in-context-recall": 0.001,
    "selective-copying": 0.001,
}
"""Of each task in the profile ``quick``: what the pilot chose (``docs/experiments/mad/learning_rates.json``)."""
BASELINES = {name: (baseline(name),) for name in TASKS}


@dataclass(frozen=True, slots=True)
class MadRun:
    """One model, trained once."""

    setting: MadSetting
    model: str
    lr: float
    weight_decay: float
    seed: int
    protocol: MadProtocol
    sizes: MadSizes

    @property
    def name(self) -> str:
        s = self.setting
        grid = f"lr{self.lr:g}-wd{self.weight_decay:g}"
        return f"{s.task_name}-{s.name}-{self.model}-{grid}-seed{self.seed}"

    def queued(self) -> QueuedRun:
        """With everything that the result depends on."""
        s = self.setting
        settings = {
            "task": s.task_name,
            "setting": s.name,
            "task_sizes": asdict(s.task),  # type: ignore[call-overload]
            "n_train": s.n_train,
            "n_test": s.n_test,
            "model": self.model,
            "model_sizes": asdict(self.sizes),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "protocol": asdict(self.protocol),
        }
        return QueuedRun(self.name, settings)

    def compute(self, callback: StepCallback = lambda step: None) -> dict[str, Any]:
        """Draw the data, train, test: JSON values, a function of the fields alone (and of the processor)."""
        data = draw(self.setting, seed=self.seed)
        model = build_model(self.model, self.setting.task, self.sizes, seed=self.seed)
        mixer, mlp = model.blocks[0].mixer, model.blocks[0].mlp
        assert mlp is not None
        counted = {
            "parameters": count_parameters(model),
            "mixer_parameters": count_parameters(mixer),
            "d_ff": mlp.down_proj.in_features,
        }
        trained = train(
            model,
            data,
            self.protocol,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
            callback=callback,
        )
        return {**counted, **trained.to_dict(self.protocol)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MadProfile:
    """A fixed grid of runs."""

    settings: Mapping[str, tuple[MadSetting, ...]]
    """Of each task."""
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...] | None
    """None means the one that the pilot chose for the task."""
    weight_decays: tuple[float, ...]
    protocol: MadProtocol
    sizes: MadSizes = field(default_factory=MadSizes)

    def runs(self, tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int]) -> list[MadRun]:
        """All models on one seed of a task, then the next task, then the next seed.

        Raises: ValueError for a task or model that the profile does not have, or a task whose learning rate is not
            chosen yet.
        """
        check_choices("tasks", tasks, self.settings)
        check_choices("models", models, MODELS)
        return [
            MadRun(setting, model, lr, weight_decay, seed, self.protocol, self.sizes)
            for seed in seeds
            for task in self.settings
            if task in tasks
            for setting in self.settings[task]
            for model in models
            for lr in self._lrs(task)
            for weight_decay in self.weight_decays
        ]

    def _lrs(self, task: str) -> tuple[float, ...]:
        if self.lrs is not None:
            return self.lrs
        wanted = (
            f"one that a pilot has chosen a learning rate for ({', '.join(LEARNING_RATES) or 'none yet'})"
        )
        check(task in LEARNING_RATES, "tasks", task, wanted)
        return (LEARNING_RATES[task],)


ABLATION = ("fem_softmax_clt", "fem_softmax_cl", "fem_softmax_c", "fem_softmax_mean")
PROFILES: dict[str, MadProfile] = {
    "quick": MadProfile(
        settings=BASELINES,
        models=("attention", "fem_softmax", "fem_gla", *ABLATION),
        seeds=(0, 1),
        lrs=None,
        weight_decays=(0.1,),
        protocol=MadProtocol(batch_size=32, steps=3000, n_evaluations=10),
    ),
    "pilot": MadProfile(
        settings=BASELINES,
        models=("attention",),
        seeds=(1000,),
        lrs=LR_GRID,
        weight_decays=(0.1,),
        protocol=MadProtocol(batch_size=32, steps=300, n_evaluations=3),
    ),
    "paper": MadProfile(
        settings={name: ladder(name) for name in TASKS},
        models=tuple(MODELS),
        seeds=(0,),
        lrs=LR_GRID,
        weight_decays=(0.0, 0.1),
        protocol=MadProtocol(batch_size=128, epochs=200, n_evaluations=200, select="best_test_perplexity"),
    ),
}
"""``quick`` for two cores; ``pilot`` chooses its learning rates on attention alone, in 300 steps of another seed;
``paper`` is the published grid of 396 runs per model."""


def chosen_rates(finished: Sequence[FinishedRun]) -> dict[str, float]:
    """Per task the learning rate with the lowest loss on the test: after few steps accuracy is still chance.

    Raises: ValueError for a task of which every run diverged.
    """
    chosen = {}
    for (task,), of_task in grouped(finished, "task").items():
        scored = [done for done in of_task if done.result["score"] is not None]
        check(bool(scored), "runs", task, "a task with a run that did not diverge")
        best = min(scored, key=lambda done: float(done.result["final"]["loss"]))
        chosen[task] = best.run.settings["lr"]
    return chosen
