"""Sequences that are ids already, such as synthetic ones, as a folder that training reads like prepared text."""

import hashlib
import os

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from helmholtz._checks import check
from helmholtz._files import atomic_folder, complete_folder
from helmholtz.data.prepare import DataConfig, complete_tokens, existing_tokens
from helmholtz.data.split import SPLITS
from helmholtz.data.tokenizer import IdTokenizer
from helmholtz.data.tokens import Metadata, SplitWriter


def write_rows(
    folder: str | os.PathLike[str],
    train: Shaped[Tensor, "..."],
    validation: Shaped[Tensor, "..."],
    *,
    n_ids: int,
    overwrite: bool = False,
) -> Metadata:
    """Make ``folder`` a folder of tokens whose documents are the rows; for ``DataConfig(tokenizer="ids")``.

    The end-of-document token ``n_ids`` follows each row. The bytes counted are those of the row in decimal, ids
    separated by spaces (``IdTokenizer``).

    Args:
        train, validation: integer ``N T``; the lengths may differ between the two.
        n_ids: ids are in ``[0, n_ids)``.
        overwrite: replace a folder of other tokens; one of the same tokens is left as it is.

    Raises: ValueError for ids out of range, or a folder that holds something else, which is then left as it was.
    """
    tokenizer = IdTokenizer(n_ids)
    rows = {"train": _checked("train", train, n_ids), "validation": _checked("validation", validation, n_ids)}
    fingerprint = _fingerprint(rows["train"], rows["validation"], n_ids)
    found = existing_tokens(
        complete_folder(folder),
        lambda there: "" if there.fingerprint == fingerprint else "holds other tokens",
        overwrite=overwrite,
    )
    if found is not None:
        return found
    with atomic_folder(folder) as partial:
        writers = {split: SplitWriter(partial, split, vocab_size=tokenizer.vocab_size) for split in SPLITS}
        for split, writer in writers.items():
            with writer:
                for row in rows[split].unbind():
                    ids = row.tolist()
                    writer.write(tokenizer.decode(ids), ids)
                    writer.end_document()
        config = DataConfig(tokenizer="ids")
        return complete_tokens(partial, tokenizer, writers, config, "document", fingerprint)


def _checked(name: str, rows: Tensor, n_ids: int) -> Int[Tensor, "N T"]:
    integer = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    check(integer, name, rows.dtype, "of an integer dtype")
    check(rows.ndim == 2 and rows.numel() > 0, name, tuple(rows.shape), "of a shape (N, T) with N, T > 0")
    low, high = (int(bound) for bound in rows.aminmax())
    check(low >= 0 and high < n_ids, name, f"ids from {low} to {high}", f"in [0, {n_ids})")
    return rows.cpu().long()


def _fingerprint(train: Tensor, validation: Tensor, n_ids: int) -> str:
    total = hashlib.blake2b(digest_size=16)
    for rows in (train, validation):
        total.update(f"{n_ids}:{tuple(rows.shape)}\n".encode())
        total.update(rows.contiguous().numpy().astype("<i8").tobytes())
    return total.hexdigest()
