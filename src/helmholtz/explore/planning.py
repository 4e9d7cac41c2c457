"""Plans as tables of bits, texts written under them side by side, and what the encoder says of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

from helmholtz._checks import check, check_integer
from helmholtz._notebook.html import (
    card,
    grid,
    note,
    text_block,
)
from helmholtz._notebook.plan import encoder_table
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.evals.plan_file import read_plan
from helmholtz.evals.plans import Codes, Group, draw_plans, sample_under
from helmholtz.explore.html import marked, spell
from helmholtz.models.planning import PlanSettings
from helmholtz.models.sampling import SamplingSettings

MOST_NEW = 96
"""Tokens that are written at most: a row of check boxes each."""
MOST_SAMPLES = 4
Held = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be written, by whatever plan.

    Raises: ValueError for more tokens or samples than fit.
    """

    prompt: str
    n_new: int = 32
    temperature: float = 0.8
    seed: int = 0
    """Of the tokens: sample r draws them from ``seed + r``, whatever the plan is."""
    n_samples: int = 2

    def __post_init__(self) -> None:
        check_integer("tokens", self.n_new)
        check(self.n_new <= MOST_NEW, "tokens", self.n_new, f"at most {MOST_NEW}")
        check_integer("samples", self.n_samples)
        check(self.n_samples <= MOST_SAMPLES, "samples", self.n_samples, f"at most {MOST_SAMPLES}")

    def settings(self, checkpoint: Checkpoint) -> SamplingSettings:
        stop = (checkpoint.tokenizer.eos_id,)
        return SamplingSettings(
            max_new_tokens=self.n_new, temperature=self.temperature, seed=self.seed, stop_tokens=stop
        )


def draw_codes(checkpoint: Checkpoint, request: Request, *, seed: int, held: Held = ()) -> Codes:
    """A plan of the prompt, by the encoder, and of the new tokens, by the prior; held bits have their value in all."""
    plan = PlanSettings(held_bits=tuple(held), seed=seed)
    prompt = checkpoint.document(request.prompt)
    (codes,) = draw_plans(checkpoint.model, prompt, request.settings(checkpoint), plan, n_plans=1)
    return codes


def write(checkpoint: Checkpoint, request: Request, codes: Codes) -> Group:
    """The samples under a plan. Raises: ValueError for codes that are not of this prompt and length."""
    prompt = checkpoint.document(request.prompt)
    wanted = len(prompt) + request.n_new
    check(len(codes) == wanted, "plan", f"{len(codes)} codes", f"{wanted}, of the prompt and the new tokens")
    return sample_under(checkpoint.model, prompt, request.settings(checkpoint), [codes] * request.n_samples)


def words_of(checkpoint: Checkpoint, request: Request, n_codes: int, written: Group) -> list[str]:
    """What the first sample has at each place of the plan; empty where it has ended."""
    tokens = [*checkpoint.document(request.prompt), *written[0].tokens]
    words = [spell(checkpoint.tokenizer, token) for token in tokens]
    return words + [""] * (n_codes - len(words))


def bits_of(code: int) -> list[int]:
    """The bits that are 1."""
    return [bit for bit in range(code.bit_length()) if code >> bit & 1]


def with_bits(codes: Codes, place: int, bits: Sequence[int], *, everywhere: bool = False) -> Codes:
    """The codes after those ``bits`` have become the ones of the code at ``place``.

    Args:
        everywhere: what this changes is set to the same value in all codes.
    """
    check(0 <= place < len(codes), "token", place, f"in [0, {len(codes)}), the plan")
    code = sum(1 << bit for bit in bits)
    changed = code ^ codes[place]
    if everywhere:
        return tuple(old & ~changed | code & changed for old in codes)
    return (*codes[:place], code, *codes[place + 1 :])


def texts_html(checkpoint: Checkpoint, request: Request, before: Group, after: Group | None) -> str:
    """Each sample under the drawn plan and, beside it, under the changed one, with the tokens marked that differ."""
    cards, tokenizer = [], checkpoint.tokenizer
    for number_, row in enumerate(before, 1):
        text = marked(tokenizer, row.tokens, row.tokens)
        cards.append(card(f"sample {number_}, the plan as drawn", text_block(request.prompt, text)))
        if after is not None:
            other = after[number_ - 1].tokens
            title = (
                f"sample {number_}, changed plan: {changed_part(row.tokens, other):.0%} of the tokens differ"
            )
            cards.append(card(title, text_block(request.prompt, marked(tokenizer, other, row.tokens))))
    return grid(cards)


def changed_part(before: Sequence[int], after: Sequence[int]) -> float:
    """Part of the places at which the two have another token; where one has ended they differ."""
    longest = max(len(before), len(after))
    same = sum(a == b for a, b in zip(before, after, strict=False))
    return 1 - same / longest if longest else 0.0


def changes_note(before: Codes, after: Codes) -> str:
    """How far the table is from the plan that was drawn."""
    flipped = sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True))
    if not flipped:
        return note(
            "The plan as it was drawn. Flip check boxes below to write the same samples under a changed plan."
        )
    tokens = sum(a != b for a, b in zip(before, after, strict=True))
    bits, at = (
        "1 bit" if flipped == 1 else f"{flipped} bits",
        "1 token" if tokens == 1 else f"{tokens} tokens",
    )
    return note(
        f"{bits} flipped at {at}. Both columns draw their tokens from the same seeds: where the texts differ, "
        "the plan made the difference."
    )


def encoder_html(checkpoint: Checkpoint, text: str) -> str:
    """The encoder's probability that each bit of each token of ``text`` is 1, and what the code holds."""
    check(bool(text), "text", text, "a text that is not empty")
    tokens = checkpoint.document(text)
    longest = checkpoint.model.config.max_seq_len
    check(len(tokens) <= longest, "text", f"{len(tokens)} tokens", f"at most {longest}")
    read = read_plan(checkpoint.model, tokens)
    words = [spell(checkpoint.tokenizer, token) for token in tokens]
    return encoder_table(words, read.probability.tolist(), read.kl.tolist())
