"""The options that describe a run, shared by the commands ``data`` and ``train``."""

from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from typing import Any

from helmholtz._checks import check_choice
from helmholtz.cli.arguments import Parser, make_parser, parse
from helmholtz.cli.documents import documents, read_documents
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokens import TokenDataset
from helmholtz.interop.datasets import DatasetConfig
from helmholtz.models import MODELS
from helmholtz.training.config import TrainConfig
from helmholtz.training.equilibrium import SolverStage
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.run import ObjectiveConfig, RunConfig, objective_class

DEFAULT_ARCHITECTURE = "fem_lm"
ARCHITECTURE = "--model.architecture"


def read_model_documents(arguments: list[str]) -> list[str]:
    """``arguments`` with those documents read that may name the architecture, for a pipe can be read only once."""
    return read_documents(arguments, ["model"])


def run_parser(command: str, description: str, arguments: list[str]) -> Parser:
    """Groups ``data``, ``dataset``, ``model`` and ``train``, so that one YAML file serves both commands.

    A Free Transformer and a Mamba-Hopfield model have the group ``objective`` as well. The vocabulary size is no
    option: it is the data's.
    """
    parser = make_parser(command, description)
    name = _architecture(arguments)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(DatasetConfig, "dataset")
    parser.add_argument(ARCHITECTURE, type=str, default=name, help=f"one of {', '.join(MODELS)}")
    _add_config(parser, MODELS[name].config_class, "model", {"vocab_size"})
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(ParallelConfig, "parallel")
    objective = objective_class(name)
    if objective is not None:
        parser.add_class_arguments(objective, "objective")
    return parser


def _add_config(parser: Parser, config_class: type, group: str, skip: set[str]) -> None:
    """The fields of a config as options, those of configs inside it as ``group.field.option``."""
    nested = {f.name: f.default for f in fields(config_class) if is_dataclass(f.default)}
    parser.add_class_arguments(config_class, group, skip={*skip, *nested})
    for name, default in nested.items():
        assert is_dataclass(default) and not isinstance(default, type)
        parser.add_class_arguments(type(default), f"{group}.{name}", default=asdict(default))


def run_config(parser: Parser, arguments: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    """The run that a command line describes, and all values of the line, for options that are not the run's.

    Raises: ValueError naming the setting that is wrong.
    """
    values = parse(parser, arguments)
    model = dict(values["model"])
    name = model.pop("architecture")
    data = DataConfig(**values["data"])
    vocab_size = TokenDataset(data.folder, "train").vocab_size
    run = RunConfig(
        architecture=name,
        model=MODELS[name].config_class.from_dict(model | {"vocab_size": vocab_size}),
        data=data,
        train=TrainConfig(**values["train"]),
        parallel=ParallelConfig(**values["parallel"]),
        objective=_objective(name, values["objective"]) if "objective" in values else None,
    )
    return run, values


def _objective(architecture: str, values: dict[str, Any]) -> ObjectiveConfig:
    config_class = objective_class(architecture)
    assert config_class is not None
    if "curriculum" in values:
        values = values | {"curriculum": tuple(SolverStage(**vars(stage)) for stage in values["curriculum"])}
    return config_class(**values)


def _architecture(arguments: list[str]) -> str:
    """The architecture asked for; its config's fields become the options of the group ``model``."""
    chosen: Any = DEFAULT_ARCHITECTURE
    arguments = read_model_documents(arguments)
    for document in documents(arguments):
        model = document.content.get("model")
        chosen = model.get("architecture", chosen) if isinstance(model, dict) else chosen
    for argument, after in pairwise([*arguments, ""]):
        if argument.startswith(f"{ARCHITECTURE}="):
            chosen = argument.split("=", 1)[1]
        elif argument == ARCHITECTURE:
            chosen = after
    check_choice("model.architecture", chosen, MODELS)
    return str(chosen)
