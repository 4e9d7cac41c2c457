"""How well and how fast a language model predicts text."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.layers.placement import device_of
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import SamplingSettings, generate

WARM_UP = 4


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """Quality of a model on a whole split."""

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    """Per token, so comparable only between models of one tokenizer; bits per byte compares all."""
    n_tokens: int
    n_bytes: int


def evaluate_language(
    model: Decoder,
    data: TokenDataset,
    *,
    seq_len: int,
    overlap: int | None = None,
    batch_size: int = 16,
) -> LanguageResult:
    r"""Predict every token of a split once, :math:`\mathrm{bpb} = -\sum_i \log_2 p(x_i | x_{<i}) / n_\mathrm{bytes}`.

    Convention: the text is one stream, each document followed by the end token, and the stream itself is preceded by
    one. So a document's first token is predicted from the end of the document before it, the end tokens are
    predicted and paid for too, and the bytes are those of the text alone. The stream is read in windows of
    ``seq_len``; the first ``overlap`` tokens of a window (default: half) are context only, for the window before it
    has predicted them. Every token but those of the first window has at least ``overlap`` tokens of context.

    Raises: ValueError for an overlap that leaves nothing to predict, or a window the model cannot take.
    Warns: ConvergenceWarning, once, if equilibria did not converge.
    """
    overlap = seq_len // 2 if overlap is None else overlap
    stream = text_stream(data)
    nats = stream_nats(model, stream, seq_len=seq_len, overlap=overlap, batch_size=batch_size)
    n_bytes = data.count_bytes(stream[1:])
    return LanguageResult(
        nats_per_token=nats / len(data),
        bits_per_byte=bits_per_byte(nats, n_bytes),
        perplexity=math.exp(min(nats / len(data), 700.0)),
        n_tokens=len(data),
        n_bytes=n_bytes,
    )


def stream_nats(
    model: Decoder, stream: Int[Tensor, " n"], *, seq_len: int, overlap: int, batch_size: int = 16
) -> float:
    """Nats of all tokens of a stream but the first, which is context: ``evaluate_language`` of any tokens.

    Raises, warns: as ``evaluate_language``.
    """
    check_window(model, seq_len)
    check(0 <= overlap < seq_len, "overlap", overlap, f"in [0, seq_len = {seq_len})")
    check_integer("batch_size", batch_size)
    device, nats = device_of(model), 0.0
    with evaluation_mode(model), one_convergence_warning(model):
        for tokens, targets in _windows(stream, seq_len, overlap, batch_size):
            logits = model(tokens.to(device)).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="none")
            nats += losses.double().sum().item()  # an ignored target has loss 0
    return nats


def check_window(model: Decoder, seq_len: int) -> None:
    """Raises: ValueError if the model cannot take windows of ``seq_len`` tokens."""
    check_integer("seq_len", seq_len)
    longest = model.config.max_seq_len
    check(seq_len <= longest, "seq_len", seq_len, f"at most the model's {longest}")


def text_stream(data: TokenDataset) -> Int[Tensor, " n"]:
    """The tokens of a split, preceded by an end token."""
    return torch.cat([torch.tensor([data.eos_id]), data.read(torch.tensor([0]), len(data))[0]])


def _windows(
    stream: Int[Tensor, " n"], seq_len: int, overlap: int, batch_size: int
) -> list[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """Inputs and targets; a target is -100 where an earlier window has predicted it or the text is over."""
    stride, n_targets = seq_len - overlap, len(stream) - 1
    starts = torch.arange(0, max(1, n_targets - overlap), stride)
    padded = F.pad(stream, (0, seq_len + stride), value=int(stream[0]))
    rows = padded[starts[:, None] + torch.arange(seq_len + 1)]
    position = starts[:, None] + torch.arange(seq_len)
    repeated = (torch.arange(seq_len) < overlap) & (starts[:, None] > 0)
    targets = rows[:, 1:].masked_fill(repeated | (position >= n_targets), -100)
    return list(zip(rows[:, :-1].split(batch_size), targets.split(batch_size), strict=True))


def decode_tokens_per_second(model: Decoder, *, n_tokens: int = 128, batch_size: int = 1) -> float:
    """Tokens generated per second, one after another, all rows counted: greedy, from a prompt of one token.

    Raises: ValueError if the model's ``max_seq_len`` is not longer than ``n_tokens``.
    """
    check_integer("n_tokens", n_tokens)
    prompts = [[0]] * batch_size
    generate(model, prompts, SamplingSettings(max_new_tokens=min(WARM_UP, n_tokens), temperature=0))
    settings = SamplingSettings(max_new_tokens=n_tokens, temperature=0)
    begin = time.perf_counter()
    generate(model, prompts, settings)
    return n_tokens * batch_size / (time.perf_counter() - begin)
