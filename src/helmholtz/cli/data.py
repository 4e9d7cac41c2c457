"""``helmholtz data``."""

from rich.console import Console

from helmholtz._display import make_losable
from helmholtz.cli.arguments import parse
from helmholtz.cli.runs import read_model_documents, run_parser
from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.data.split import SPLITS
from helmholtz.interop.datasets import DatasetConfig, prepare_dataset

DESCRIPTION = (
    "Turn text into a folder of tokens. Done before with the same text and settings, nothing is done."
)


def run(arguments: list[str], console: Console) -> int:
    arguments = read_model_documents(arguments)
    parser = run_parser("data", DESCRIPTION, arguments)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of other text or settings")
    values = parse(parser, arguments)
    make_losable(console)
    data, dataset = DataConfig(**values["data"]), DatasetConfig(**values["dataset"])
    if dataset.path is None:
        prepared = prepare(data, overwrite=values["overwrite"], console=console)
    else:
        prepared = prepare_dataset(data, dataset, overwrite=values["overwrite"], console=console)
    metadata = prepared.metadata
    state = "already there" if prepared.reused else "prepared"
    console.print(
        f"{prepared.folder}: {state}, vocabulary {metadata.vocab_size}, split by {metadata.split_by}"
    )
    for split in SPLITS:
        counts = getattr(metadata, split)
        console.print(
            f"  {split}: {counts.n_tokens:,} tokens, {counts.n_bytes:,} bytes, {counts.n_documents:,} documents"
        )
    return 0
