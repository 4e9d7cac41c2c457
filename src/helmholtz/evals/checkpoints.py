"""A checkpoint that was found: its model, its tokenizer, and texts as the model reads them."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helmholtz._checks import check
from helmholtz._run_folder import TOKENIZER
from helmholtz.data.tokenizer import AbstractTokenizer, load_tokenizer
from helmholtz.evals.runs import find_checkpoint
from helmholtz.models.checkpoint import architecture_of, load_checkpoint
from helmholtz.models.decoder import Decoder


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found: its folder and its model."""

    folder: Path
    model: Decoder

    @functools.cached_property
    def tokenizer(self) -> AbstractTokenizer:
        """Read when it is asked for: a checkpoint without one can be looked at all the same."""
        return load_tokenizer(self.folder / TOKENIZER)

    def encode(self, text: str) -> list[int]:
        """Ids of a text to look at. Raises: ValueError for less than two."""
        tokens = self.tokenizer.encode(text)
        check(len(tokens) > 1, "text", text, "at least 2 tokens")
        return tokens

    def document(self, text: str) -> list[int]:
        """A document begins after the end of another: so do a prompt and a text whose plan is read."""
        return [self.tokenizer.eos_id, *self.tokenizer.encode(text)]


def open_checkpoint(path: str, part: Literal["plan", "equilibrium"] | None = None) -> Checkpoint:
    """The checkpoint of a command. Raises: ValueError if there is none, or if the model lacks the part."""
    found = Checkpoint(folder := find_checkpoint(path), load_checkpoint(folder))
    if part is not None and getattr(found.model, part) is None:
        raise ValueError(f"checkpoint: the {architecture_of(found.model)} in {folder} has no {part}")
    return found
