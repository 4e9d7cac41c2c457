"""Plans as tables: the bits of each token's code, and how sure the encoder is of each."""

import math
from collections.abc import Sequence

from helmholtz._notebook.html import CSS, cells, head_cells, heat, note, number, table, token_heads

MOST_TOKENS = 128
"""Of a plan that a notebook shows."""


def codes_table(words: Sequence[str], before: Sequence[int], after: Sequence[int], n_bits: int) -> str:
    """A row per bit and a column per token; what differs from the codes ``before`` is marked."""
    rows = []
    for bit in range(n_bits):
        row = [f"<td>bit {bit}</td>"]
        for old, new in zip(before, after, strict=True):
            value = new >> bit & 1
            mark = " hz-flipped" if (old ^ new) >> bit & 1 else ""
            row.append(f'<td class="hz-heat{mark}" style="--w:{0.5 * value}">{value}</td>')
        rows.append(f"<tr>{''.join(row)}</tr>")
    places = [f"{place}: {word}" if word else str(place) for place, word in enumerate(words)]
    return table([head_cells("token"), *token_heads(places)], rows)


def encoder_table(words: Sequence[str], probability: Sequence[Sequence[float]], kl: Sequence[float]) -> str:
    """A row per token: the probability that each bit is 1, and the KL from the prior, given in nats, in bits."""
    n_bits = len(probability[0])
    head = [head_cells("token", *(f"bit {bit}" for bit in range(n_bits)), "KL, bits")]
    rows = [
        f"<tr>{cells(f'{place}: {word}' if word else str(place))}{''.join(map(heat, chances))}"
        f"{number(nats / math.log(2))}</tr>"
        for place, (word, chances, nats) in enumerate(zip(words, probability, kl, strict=True))
    ]
    mean = sum(kl) / len(kl) / math.log(2)
    legend = (
        f"Cells are the percentages with which the encoder sets a bit to 1. A code holds at most {n_bits} "
        f"bits of its text, here {mean:.2f} a token on average (KL from the prior)."
    )
    return table(head, rows) + note(legend)


def codes_html(codes: Sequence[int], n_bits: int, words: Sequence[str] = ()) -> str:
    """Codes by themselves, the first ``MOST_TOKENS`` of them."""
    shown = codes[:MOST_TOKENS]
    spelt = list(words[: len(shown)]) or [""] * len(shown)
    found = f"{len(codes)} codes of {n_bits} bits"
    more = "" if len(shown) == len(codes) else f"; the first {len(shown)} are shown"
    return (
        f"<div><style>{CSS}</style>{codes_table(spelt, shown, shown, n_bits)}{note(found + more + '.')}</div>"
    )


def encoder_html(
    probability: Sequence[Sequence[float]], kl: Sequence[float], words: Sequence[str] = ()
) -> str:
    """What the encoder says of a text, its first ``MOST_TOKENS`` tokens."""
    shown = slice(MOST_TOKENS)
    spelt = list(words[shown]) or [""] * len(kl[shown])
    return f"<div><style>{CSS}</style>{encoder_table(spelt, probability[shown], kl[shown])}</div>"
