"""``helmholtz evaluate``."""

import json
from dataclasses import asdict

from rich.console import Console

from helmholtz._hardware import peak_memory_bytes
from helmholtz._run_folder import TOKENIZER
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.checkpoints import check_same_tokenizer
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.language import decode_tokens_per_second, evaluate_language
from helmholtz.evals.runs import find_checkpoint, training_data
from helmholtz.models.checkpoint import load_checkpoint

DESCRIPTION = "Bits per byte and perplexity over a whole split, and the speed of decoding."


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("evaluate", DESCRIPTION)
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="a run (its best weights) or a checkpoint"
    )
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="folder of prepared text; default: what the run was trained on",
    )
    parser.add_argument("--split", type=str, default="validation", help="train or validation")
    parser.add_argument(
        "--seq_len", type=int | None, default=None, help="window; default: the model's longest"
    )
    parser.add_argument(
        "--overlap", type=int | None, default=None, help="context tokens of a window; default: half"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows per pass")
    parser.add_argument("--json", action="store_true", help="print JSON")
    values = parse(parser, arguments)
    checkpoint = find_checkpoint(values["checkpoint"])
    folder = values["data"] or training_data(values["checkpoint"])
    model, data = load_checkpoint(checkpoint), TokenDataset(folder, values["split"])
    check_same_tokenizer(checkpoint / TOKENIZER, data.tokenizer_folder)
    quality = evaluate_language(
        model,
        data,
        seq_len=values["seq_len"] or model.config.max_seq_len,
        overlap=values["overlap"],
        batch_size=values["batch_size"],
    )
    n_tokens = min(128, model.config.max_seq_len // 2)
    result = asdict(quality) | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decode_tokens_per_second": decode_tokens_per_second(model, n_tokens=n_tokens),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if values["json"]:
        console.print(json.dumps(result), markup=False)
    else:
        for name, value in result.items():
            console.print(f"{name:<26}{value:,.4f}" if isinstance(value, float) else f"{name:<26}{value:,}")
    return 0
