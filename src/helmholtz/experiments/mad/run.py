"""The MAD study as a queue: which runs there are, in which order, and what one of them computes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from helmholtz._checks import check, check_choices
from helmholtz.experiments.mad.data import TASKS, MadSetting, baseline, draw, ladder
from helmholtz.experiments.mad.models import MODELS, Initialization, MadSizes, build_model
from helmholtz.experiments.mad.training import MadProtocol, StepCallback, train
from helmholtz.experiments.queue import FinishedRun, QueuedRun, grouped
from helmholtz.layers.sizing import count_parameters

LR_GRID = (1e-4, 5e-4, 1e-3)
LEARNING_RATES: dict[str, dict[str, float]] = {}
"""Of each task and model in ``quick``: what the pilot chose (``docs/experiments/mad/learning_rates.json``)."""
ABLATION = ("fem_softmax_clt", "fem_softmax_cl", "fem_softmax_c", "fem_softmax_mean")
"""They have the learning rates of ``fem_softmax``: its parts are compared with all else equal."""
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
    initialization: Initialization = "fan_in"

    @property
    def name(self) -> str:
        s = self.setting
        grid = f"lr{self.lr:g}-wd{self.weight_decay:g}"
        return f"{s.task_name}-{s.name}-{self.model}-{grid}-{self.initialization}-seed{self.seed}"

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
            "initialization": self.initialization,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "protocol": asdict(self.protocol),
        }
        return QueuedRun(self.name, settings)

    def compute(self, callback: StepCallback = lambda step: None) -> dict[str, Any]:
        """Draw the data, train, test: JSON values, a function of the fields alone (and of the processor)."""
        data = draw(self.setting, seed=self.seed)
        model = build_model(
            self.model, self.setting.task, self.sizes, seed=self.seed, initialization=self.initialization
        )
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
    extra_seeds: tuple[int, ...] = ()
    """Of cells whose seeds disagree: computed where they are asked for, and reported where they are."""
    lrs: tuple[float, ...] | None
    """None means the one that the pilot chose for the task and the model."""
    weight_decays: tuple[float, ...]
    protocol: MadProtocol
    sizes: MadSizes = field(default_factory=MadSizes)
    initializations: tuple[Initialization, ...] = ("fan_in",)
    tasks_first: bool = False
    """Whether all seeds of a task come before the next task; else all tasks on a seed come before the next seed."""

    def runs(self, tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int]) -> list[MadRun]:
        """All models on one seed of a task under one start, learning rate and weight decay, then the next of these.

        Raises: ValueError for a task or model that the profile does not have, or a task and model whose learning rate
            is not chosen yet.
        """
        check_choices("tasks", tasks, self.settings)
        check_choices("models", models, MODELS)
        wanted = [task for task in self.settings if task in tasks]
        pairs = [(seed, task) for seed in seeds for task in wanted]
        if self.tasks_first:
            pairs = [(seed, task) for task in wanted for seed in seeds]
        return [
            MadRun(
                setting,
                model,
                chosen_rate(task, model) if lr is None else lr,
                weight_decay,
                seed,
                self.protocol,
                self.sizes,
                initialization,
            )
            for seed, task in pairs
            for setting in self.settings[task]
            for initialization in self.initializations
            for lr in self.lrs or (None,)
            for weight_decay in self.weight_decays
            for model in models
        ]


def chosen_rate(task: str, model: str) -> float:
    """What the pilot chose. Raises: ValueError if it has not."""
    rates = LEARNING_RATES.get(task, {})
    tuned = "fem_softmax" if model in ABLATION else model
    known = ", ".join(f"{task}: {' '.join(of_task)}" for task, of_task in LEARNING_RATES.items())
    wanted = f"a task and model that a pilot has chosen a learning rate for ({known or 'none yet'})"
    check(tuned in rates, "tasks", f"{task} with {model}", wanted)
    return rates[tuned]


PROFILES: dict[str, MadProfile] = {
    "quick": MadProfile(
        settings=BASELINES,
        models=("attention", "fem_softmax", "fem_gla", "mamba", *ABLATION),
        seeds=(0, 1),
        extra_seeds=(2,),
        lrs=None,
        weight_decays=(0.1,),
        protocol=MadProtocol(batch_size=32, steps=3000, n_evaluations=10),
    ),
    "pilot": MadProfile(
        settings=BASELINES,
        models=("attention", "fem_softmax", "fem_gla", "mamba"),
        seeds=(1000,),
        lrs=LR_GRID,
        weight_decays=(0.1,),
        protocol=MadProtocol(batch_size=32, steps=300, n_evaluations=3),
    ),
    "start": MadProfile(
        settings={name: BASELINES[name] for name in ("fuzzy-in-context-recall", "selective-copying")},
        models=("attention", "fem_softmax", "fem_gla"),
        seeds=(0, 1),
        extra_seeds=(2,),
        lrs=(1e-3, 5e-4),
        weight_decays=(0.1,),
        protocol=MadProtocol(batch_size=32, steps=3000, n_evaluations=10),
        initializations=("fan_in", "normal_0.02"),
        tasks_first=True,
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
"""``quick`` for two cores; ``pilot`` chooses its learning rates, in 300 steps of another seed; ``start`` is the grid
{by fan-in, at 0.02} x {1e-3, 5e-4} on the two tasks that need longest; ``paper`` is the published grid of 396 runs per
model."""


def chosen_rates(finished: Sequence[FinishedRun]) -> dict[str, dict[str, float]]:
    """Per task and model the learning rate with the lowest loss on the test: after few steps accuracy is still chance.

    Raises: ValueError for a task and model of which every run diverged.
    """
    chosen: dict[str, dict[str, float]] = {}
    for (task, model), tried in grouped(finished, "task", "model").items():
        scored = [done for done in tried if done.result["score"] is not None]
        check(bool(scored), "runs", f"{task} with {model}", "a pair with a run that did not diverge")
        best = min(scored, key=lambda done: float(done.result["final"]["loss"]))
        chosen.setdefault(task, {})[model] = best.run.settings["lr"]
    return chosen
