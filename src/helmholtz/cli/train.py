"""``helmholtz train``."""

from typing import Any

from rich.console import Console

from helmholtz._checks import check_choice
from helmholtz.cli.arguments import Parser, config_files, make_parser, parse, read_yaml
from helmholtz.data.tokens import TokenDataset
from helmholtz.models import MODELS
from helmholtz.training.config import TrainConfig
from helmholtz.training.run import RunConfig, train

DEFAULT_ARCHITECTURE = "fem_lm"
ARCHITECTURE = "--model.architecture"


def architecture(arguments: list[str]) -> str:
    """The architecture asked for: its config's fields become the options of the group ``model``."""
    chosen: Any = DEFAULT_ARCHITECTURE
    for file in config_files(arguments):
        model = read_yaml(file).get("model")
        chosen = model.get("architecture", chosen) if isinstance(model, dict) else chosen
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith(f"{ARCHITECTURE}="):
            chosen = argument.split("=", 1)[1]
        elif argument == ARCHITECTURE:
            chosen = after
    check_choice("model.architecture", chosen, MODELS)
    return chosen


def run_parser(command: str, description: str, arguments: list[str]) -> Parser:
    """The options of a run. The vocabulary size is not among them: it is the data's."""
    parser = make_parser(command, description)
    name = architecture(arguments)
    parser.add_argument(ARCHITECTURE, type=str, default=name, help=f"one of {', '.join(MODELS)}")
    parser.add_class_arguments(MODELS[name].config_class, "model", skip={"vocab_size"})
    parser.add_argument(
        "--data", type=str, default="data/shakespeare", help="folder of prepared text (helmholtz data)"
    )
    parser.add_class_arguments(TrainConfig, "train")
    return parser


def run_config(arguments: list[str]) -> RunConfig:
    """The run that a command line describes."""
    description = (
        "Train a model on prepared text. Stopped by Ctrl-C or a crash, it goes on with --train.resume=auto."
    )
    values = parse(run_parser("train", description, arguments), arguments)
    model = values["model"]
    name = model.pop("architecture")
    vocab_size = TokenDataset(values["data"], "train").vocab_size
    return RunConfig(
        architecture=name,
        model=MODELS[name].config_class.from_dict(model | {"vocab_size": vocab_size}),
        data=values["data"],
        train=TrainConfig(**values["train"]),
    )


def run(arguments: list[str], console: Console) -> int:
    config = run_config(arguments)
    result = train(config, console=console)
    if result.status == "interrupted":
        resume = " ".join(["helmholtz train", *arguments, "--train.resume=auto"])
        console.print(
            f"stopped after step {result.step}; saved in {result.folder}; to go on:\n{resume}", markup=False
        )
        return 130
    console.print(f"finished: {result.step} steps, {result.tokens:,} tokens; {result.folder}", markup=False)
    return 0
