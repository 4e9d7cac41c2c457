"""Checkpoints and their tokenizers."""

from pathlib import Path

from helmholtz._files import read_complete


def check_same_tokenizer(ours: Path, theirs: Path) -> None:
    """Raises: ValueError if two tokenizer folders differ: the ids of one would mean nothing to the other."""
    read_complete(ours.parent, lambda around: _compare(around / ours.name, theirs))


def _compare(ours: Path, theirs: Path) -> None:
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()})
    for name in names:
        one, two = ours / name, theirs / name
        if not one.exists() or not two.exists() or one.read_bytes() != two.read_bytes():
            raise ValueError(
                f"data: the tokenizer in {theirs} is not the one the model was trained with ({ours})"
            )
