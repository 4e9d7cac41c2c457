"""The ``generation_kwargs`` of lm-evaluation-harness's tasks: read as its type ``hf`` reads them, or refused."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from helmholtz._checks import check, check_integer, check_keys
from helmholtz.models.sampling import SamplingSettings

SAMPLING = {"temperature": float, "top_k": int, "top_p": float}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one thing; where several are given, the first of these counts."""
KEYS = (*SAMPLING, *LENGTHS, "until", "do_sample", "num_beams")
MAX_NEW_TOKENS = 256
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "none": None}
"""What YAML and the command line of lm_eval make of yes and no, in lower case."""
RESERVED = 1 / 4
"""Of the window: what a prompt leaves to a continuation that wants so much, however long the prompt is."""


def read_generation_kwargs(
    options: Mapping[str, Any], *, end: int, seed: int
) -> tuple[SamplingSettings, list[str]]:
    """How to continue, and the strings that end a continuation.

    ``do_sample`` decides; where it is missing, a temperature above 0 does. Sampling without a temperature has 1.

    Raises: ValueError for a key that is unknown or a value that cannot be honoured.
    """
    check_keys("generation_kwargs", options, KEYS)
    given = {name: value for name, value in options.items() if value is not None}
    beams = given.pop("num_beams", 1)
    check(beams in (1, "1"), "generation_kwargs: num_beams", beams, "1: there is no beam search")
    if "do_sample" in given:
        given["do_sample"] = _boolean("do_sample", given["do_sample"])
    if given.get("do_sample"):
        given.setdefault("temperature", 1.0)
    try:
        known = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
        sampled = {name: cast(known[name]) for name, cast in SAMPLING.items() if name in known}
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs: {error}") from error
    check_integer("generation_kwargs: the most new tokens", known["max_gen_toks"])
    if sampled.get("top_k") in (0, -1):
        del sampled["top_k"]  # off, in transformers and in vLLM
    if not known["do_sample"]:
        sampled = {"temperature": 0.0}
    settings = SamplingSettings(
        max_new_tokens=known["max_gen_toks"], stop_tokens=(end,), seed=seed, **sampled
    )
    return settings, known["until"]


def fit_windows(
    prompts: Sequence[list[int]], wanted: Sequence[int], window: int
) -> list[tuple[list[int], int]]:
    """The end of each prompt and the length of its continuation, which together fit the window.

    A continuation of up to a quarter of the window has the length it wants, and the prompt is cut to the rest, as in
    lm_eval's type ``hf``. A longer one has what the prompt leaves, and at least that quarter.

    Warns: UserWarning, once for all, of prompts that are cut and continuations that are shortened.
    """
    check_integer("max_length", window, minimum=2)
    fitted = []
    for prompt, length in zip(prompts, wanted, strict=True):
        kept = prompt[min(length, max(1, int(window * RESERVED))) - window :]
        fitted.append((kept, min(length, window - len(kept))))
    n_cut = sum(len(kept) < len(prompt) for (kept, _), prompt in zip(fitted, prompts, strict=True))
    n_short = sum(room < length for (_, room), length in zip(fitted, wanted, strict=True))
    if n_cut or n_short:
        warnings.warn(
            f"max_length is {window} tokens: of {len(prompts)} prompts {n_cut} lose their beginning, and "
            f"{n_short} leave less than the wanted length to the continuation",
            stacklevel=3,
        )
    return fitted


def _boolean(name: str, value: object) -> bool | None:
    word = str(value).strip().lower()
    check(word in BOOLEANS, f"generation_kwargs: {name}", value, "true or false")
    return BOOLEANS[word]
