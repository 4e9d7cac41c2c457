"""Tokens as HTML; the pieces that need no tokenizer are those of notebooks."""

import html
from collections.abc import Sequence

from helmholtz.data.tokenizer import AbstractTokenizer

END = "<end>"


def spell(tokenizer: AbstractTokenizer, token: int) -> str:
    """A token as a label: blanks and line ends shown."""
    text = END if token == tokenizer.eos_id else tokenizer.decode([token])
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}").replace(" ", "\N{OPEN BOX}")


def marked(tokenizer: AbstractTokenizer, tokens: Sequence[int], before: Sequence[int]) -> str:
    """A text as HTML, those tokens marked that are not the ones ``before`` has at the same place.

    Tokens of a kind are decoded together, as a character may take several.
    """
    parts, start = [], 0
    differs = [place >= len(before) or token != before[place] for place, token in enumerate(tokens)]
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or differs[end] != differs[start]:
            text = html.escape(tokenizer.decode(tokens[start:end]))
            parts.append(f"<mark>{text}</mark>" if differs[start] else text)
            start = end
    return "".join(parts)
