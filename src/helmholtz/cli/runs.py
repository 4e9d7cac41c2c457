"""The options that describe a run, shared by the commands ``data`` and ``train``."""

from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from typing import Any

from helmholtz._checks import check, check_choice
from helmholtz.cli.arguments import Parser, make_parser, parse
from helmholtz.cli.documents import documents, read_documents
from helmholtz.data.prepare import DataConfig
from helmholtz.data.tokens import TokenDataset
from helmholtz.interop.datasets import DatasetConfig
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig, PlanConfig
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.equilibrium import SolverStage
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.parts import ObjectiveConfig, objective_class

DEFAULT_ARCHITECTURE = "fem_lm"
ARCHITECTURE = "--model.architecture"
LAYERS = "list of layers, or a pattern such as 'attention, fem:gla x3, mamba'"
PARTS = {"plan": PlanConfig, "equilibrium": EquilibriumConfig}
"""Settings of a ``DecoderConfig`` that are a mapping; ``DecoderConfig`` fills in widths, and checks them."""


def read_model_documents(arguments: list[str]) -> list[str]:
    """``arguments`` with those documents read that may name the architecture, for a pipe can be read only once."""
    return read_documents(arguments, ["model"])


def run_parser(command: str, description: str, arguments: list[str]) -> Parser:
    """Groups ``data``, ``dataset``, ``model`` and ``train``, so that one YAML file serves both commands.

    An architecture that can have a plan or an equilibrium has the group ``objective`` as well. The vocabulary size is
    no option: it is the data's.
    """
    parser = make_parser(command, description)
    name = _architecture(arguments)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(DatasetConfig, "dataset")
    parser.add_argument(ARCHITECTURE, type=str, default=name, help=f"one of {', '.join(MODELS)}")
    _add_config(parser, MODELS[name].config_class, "model", {"vocab_size"})
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(ParallelConfig, "parallel")
    objective = objective_class(MODELS[name].config_class)
    if objective is not None:
        parser.add_class_arguments(objective, "objective")
    return parser


def _add_config(parser: Parser, config_class: type, group: str, skip: set[str]) -> None:
    """The fields of a config as options, those of configs inside it as ``group.field.option``."""
    nested = {f.name: f.default for f in fields(config_class) if is_dataclass(f.default)}
    # what holds configs of several kinds or in any number is read by the config, not by the parser
    whole = {"layers", *PARTS} if config_class is DecoderConfig else set()
    parser.add_class_arguments(config_class, group, skip={*skip, *nested, *whole})
    if whole:
        parser.add_argument(f"--{group}.layers", type=Any, default=None, help=LAYERS)
        for name, part in PARTS.items():
            keys = parser.keys[f"{group}.{name}"] = [f.name for f in fields(part)]
            help = f"mapping, or one by one as --{group}.{name}.{keys[0]}: {', '.join(keys)}"
            parser.add_argument(f"--{group}.{name}", type=dict[str, Any] | None, default=None, help=help)
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
    config = MODELS[name].config_class.from_dict(model | {"vocab_size": vocab_size})
    run = RunConfig(
        architecture=name,
        model=config,
        data=data,
        train=TrainConfig(**values["train"]),
        parallel=ParallelConfig(**values["parallel"]),
        objective=_objective(config, values["objective"]) if "objective" in values else None,
    )
    return run, values


def _objective(model: ModelConfig, values: dict[str, Any]) -> ObjectiveConfig | None:
    """Raises: ValueError for a setting of a part that this model does not have."""
    possible, wanted = objective_class(type(model)), objective_class(model)
    assert possible is not None
    own = {f.name for f in fields(wanted)} if wanted is not None else set()
    for option in fields(possible):
        value = values[option.name]
        value = tuple(value) if isinstance(value, list) else value
        absent = "absent: the model has no part that it is of"
        check(option.name in own or value == option.default, f"objective.{option.name}", value, absent)
    if wanted is None:
        return None
    values = {name: value for name, value in values.items() if name in own}
    if "curriculum" in values:
        values = values | {"curriculum": tuple(SolverStage(**vars(stage)) for stage in values["curriculum"])}
    return wanted(**values)


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
