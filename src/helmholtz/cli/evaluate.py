"""``helmholtz evaluate``."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from helmholtz._hardware import PeakMemory
from helmholtz._run_folder import TOKENIZER
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.data.tokenizer import check_same_tokenizer
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.language import decode_tokens_per_second, evaluate_language
from helmholtz.evals.latent import evaluate_bounds, report
from helmholtz.evals.runs import find_checkpoint, training_data
from helmholtz.layers.placement import device_of
from helmholtz.layers.sizing import count_parameters
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder

DESCRIPTION = (
    "Bits per byte and perplexity over a whole split, and the speed of decoding; of a free_transformer, bounds of its "
    "nats per token and the usage of its plan."
)
NOTES = {
    "posterior_cross_entropy_leaking": "leaks: not a language-model loss",
    "prior_cross_entropy": "upper bound",
    "kl": "price of the posterior's plan",
    "elbo": "upper bound: posterior cross-entropy + KL",
    "importance_weighted": "upper bound: n_samples plans of the posterior",
    "mixture_weighted": "upper bound: these and plans of the prior",
    "effective_samples": "of n_samples; near 1, more samples would help",
    "active_bits": "bits that carry more than 0.01 nats",
    "mutual_information": "nats that the code says about its token",
}


def _quality(model: Decoder, data: TokenDataset, values: dict[str, Any]) -> dict[str, Any]:
    plan_options = {key: values[key] for key in ("n_samples", "n_windows") if values[key] is not None}
    seq_len = model.config.max_seq_len if values["seq_len"] is None else values["seq_len"]
    batch_size = values["batch_size"]
    if model.plan is not None:
        if values["overlap"]:
            raise ValueError(
                "overlap: the windows of a model with a plan have none, each has a plan of its own"
            )
        return report(evaluate_bounds(model, data, seq_len=seq_len, batch_size=batch_size, **plan_options))
    for name in plan_options:
        raise ValueError(f"{name}: this model has no plan, its number is exact")
    overlap = values["overlap"]
    return asdict(evaluate_language(model, data, seq_len=seq_len, overlap=overlap, batch_size=batch_size))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines += _lines(value)
        elif isinstance(value, tuple):
            lines.append(f"{name:<37}{' '.join(f'{item:.4f}' for item in value)}")
        else:
            number = (
                f"{value:,.4f}" if isinstance(value, float) else "unknown" if value is None else f"{value:,}"
            )
            note = f"({NOTES[name]})" if name in NOTES else ""
            lines.append(f"{name:<37}{number:<10}{note}".rstrip())
    return lines


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("evaluate", DESCRIPTION)
    option = parser.add_argument
    add_checkpoint(parser)
    option("--data", type=str, help="folder of prepared text; default: what the run was trained on")
    option("--split", type=str, default="validation", help="split to evaluate: train or validation")
    option("--seq_len", type=int | None, help="tokens of a window; default: max_seq_len of the model")
    overlap = "tokens at the start of a window that are context only; default: half of it, none for a model with a plan"
    option("--overlap", type=int | None, help=overlap)
    option("--batch_size", type=int, default=16, help="windows per forward pass")
    plans = "with a plan only: plans per window in the importance-weighted bound; default: 64"
    option("--n_samples", type=int | None, help=plans)
    windows = "with a plan only: number of windows, evenly spaced over the split; default: all"
    option("--n_windows", type=int | None, help=windows)
    option("--json", action="store_true", help="print JSON")
    values = parse(parser, arguments)
    checkpoint = find_checkpoint(values["checkpoint"])
    folder = values["data"] or training_data(values["checkpoint"])
    model, data = load_checkpoint(checkpoint), TokenDataset(folder, values["split"])
    check_same_tokenizer(checkpoint / TOKENIZER, data.tokenizer_folder)
    n_tokens = min(128, model.config.max_seq_len // 2)
    with PeakMemory(device_of(model)) as memory:
        quality = _quality(model, data, values)
    result = quality | {
        "parameters": count_parameters(model),
        "decode_tokens_per_second": decode_tokens_per_second(model, n_tokens=n_tokens),
        "peak_memory_bytes": memory.read(),
    }
    console.print(json.dumps(result) if values["json"] else "\n".join(_lines(result)))
    return 0
