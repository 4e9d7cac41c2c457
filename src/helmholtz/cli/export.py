"""``helmholtz export``."""

from rich.console import Console

from helmholtz.cli.arguments import make_parser, output_folder, parse

DESCRIPTION = (
    "Write a trained model as a folder that Hugging Face's transformers loads: weights, config, tokenizer, generation "
    "config and model card. Nothing is overwritten and nothing is uploaded."
)


def run(arguments: list[str], console: Console) -> int:
    from transformers.utils import logging

    from helmholtz.interop.hf.export import MAX_SHARD_SIZE, UNKNOWN_LICENSE, export

    parser = make_parser("export", DESCRIPTION)
    parser.add_argument("source", type=str, help="a run (its best weights) or a checkpoint")
    parser.add_argument("folder", type=str, help="a new or an empty folder")
    parser.add_argument(
        "--license",
        type=str,
        default=UNKNOWN_LICENSE,
        help="identifier of the weights' licence for the model card",
    )
    parser.add_argument(
        "--max_shard_size", type=str, default=MAX_SHARD_SIZE, help="largest file of weights, as 200MB"
    )
    values = parse(parser, arguments)
    output_folder("folder", values["folder"])
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        written = export(
            values["source"],
            values["folder"],
            license=values["license"],
            max_shard_size=values["max_shard_size"],
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    facts = written.facts
    text = f"{written.folder}: {facts.architecture}, {facts.parameters:,} parameters, licence {facts.license}"
    console.print(f"{text}\nto publish it: hf upload <user>/<name> {written.folder}")
    return 0
