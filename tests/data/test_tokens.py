"""Token files are read exactly, with their boundaries, and damage is found before it reaches a model."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz.data import Metadata, SplitCounts, TokenDataset
from helmholtz.data.split import SPLITS
from helmholtz.data.tokens import SplitWriter, token_dtype

VOCAB, EOS = 300, 299
DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]


def write(folder, docs, vocab_size=VOCAB):
    """A prepared folder whose two splits both hold ``docs``; each document is written in two pieces."""
    counts = {}
    for split in SPLITS:
        with SplitWriter(folder, split, vocab_size=vocab_size) as writer:
            for ids in docs:
                for piece in (ids[:2], ids[2:]):
                    if piece:
                        writer.write("é" * len(piece), piece)
                writer.end_document()
        counts[split] = writer.counts()
    Metadata(
        format=1,
        vocab_size=vocab_size,
        eos_id=vocab_size - 1,
        dtype=token_dtype(vocab_size),
        split_by="tail",
        fingerprint="",
        settings={},
        **counts,
    ).save(folder)
    return TokenDataset(folder, "validation")


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path, DOCUMENTS)


def test_documents_are_kept_in_order_with_ends_and_starts(dataset):
    stream = dataset.read(torch.tensor([0]), len(dataset))[0].tolist()
    assert stream == [1, 2, 3, EOS, 4, EOS, 5, 6, 7, 8, 9, EOS]
    assert dataset.document_starts.tolist() == [0, 4, 6]
    assert dataset.counts == SplitCounts(n_tokens=12, n_bytes=18, n_documents=3)
    assert (dataset.vocab_size, dataset.eos_id, dataset.n_bytes) == (VOCAB, EOS, 18)


@pytest.mark.parametrize(("vocab_size", "width"), [(257, 2), (65536, 2), (65537, 4), (100_000, 4)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path, vocab_size, width):
    dataset = write(tmp_path, [[0, vocab_size - 2]], vocab_size)
    assert (tmp_path / "train.bin").stat().st_size == 3 * width
    assert dataset.read(torch.tensor([0]), 3).tolist() == [[0, vocab_size - 2, vocab_size - 1]]


def test_files_are_little_endian_on_every_machine(tmp_path):
    write(tmp_path, [[258]])
    assert (tmp_path / "train.bin").read_bytes() == bytes([2, 1, EOS % 256, 1])


def test_windows_are_int64_and_those_outside_are_refused(dataset):
    rows = dataset.read(torch.tensor([8, 0]), 4)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[7, 8, 9, EOS], [1, 2, 3, EOS]]
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=rf"starts must be in \[0, 8\] .*got {bad}"):
            dataset.read(torch.tensor([bad]), 4)


def test_a_split_shorter_than_the_window_says_how_much_it_has(dataset):
    with pytest.raises(ValueError, match="validation split has 12 tokens, a window of 13 is wanted"):
        dataset.read(torch.tensor([0]), 13)


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(lengths=LENGTHS, seq_len=st.integers(1, 12), data=st.data())
def test_packed_rows_know_their_documents(lengths, seq_len, data, tmp_path_factory):
    docs = [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    dataset = write(tmp_path_factory.mktemp("packed"), docs)
    if len(dataset) <= seq_len:
        return
    owner = [i for i, ids in enumerate(docs) for _ in [*ids, EOS]]
    start = data.draw(st.integers(0, len(dataset) - seq_len - 1))
    (row,) = dataset.packed_rows(torch.tensor([start]), seq_len)
    plain = dataset.read(torch.tensor([start]), seq_len + 1)
    torch.testing.assert_close(row.inputs, plain[:, :-1])
    here = owner[start : start + seq_len + 1]
    changes = [t for t in range(1, seq_len) if here[t] != here[t - 1]]
    assert row.cu_seqlens.tolist() == [0, *changes, seq_len]
    for t in range(seq_len):
        assert row.targets[0, t] == (plain[0, t + 1] if here[t + 1] == here[t] else -100)


def test_unknown_splits_are_refused(dataset):
    with pytest.raises(ValueError, match="split must be one of .*got 'valid'; did you mean 'validation'"):
        TokenDataset(dataset.folder, "valid")


def test_truncated_and_missing_token_files_are_named_with_both_sizes(dataset):
    path = dataset.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train\.bin has 23 bytes, the metadata say 24"):
        TokenDataset(dataset.folder, "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train\.bin is missing"):
        TokenDataset(dataset.folder, "train")


def test_tokens_outside_the_vocabulary_are_named_with_their_position(dataset):
    stream = np.fromfile(dataset.folder / "train.bin", dtype="<u2")
    stream[7] = VOCAB
    stream.tofile(dataset.folder / "train.bin")
    damaged = TokenDataset(dataset.folder, "train")
    assert damaged.read(torch.tensor([0]), 7).shape == (1, 7)
    with pytest.raises(ValueError, match=r"train\.bin: token 300 at position 7 is outside .* of 300"):
        damaged.read(torch.tensor([0, 5]), 4)


def test_damaged_indices_are_named(dataset):
    path = dataset.folder / "train.documents.npy"
    np.save(path, np.arange(2))
    with pytest.raises(ValueError, match=r"train\.documents\.npy: 2 documents, the metadata say 3"):
        TokenDataset(dataset.folder, "train")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.documents\.npy: damaged document index"):
        TokenDataset(dataset.folder, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_damaged_metadata_are_named(dataset, content):
    (dataset.folder / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json: damaged metadata"):
        TokenDataset(dataset.folder, "train")


def test_unknown_metadata_and_folders_of_something_else_are_refused(dataset, tmp_path):
    path = dataset.folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": 1}))
    with pytest.raises(ValueError, match="damaged metadata.*colour"):
        TokenDataset(dataset.folder, "train")
    with pytest.raises(ValueError, match="is no folder of prepared text"):
        TokenDataset(tmp_path / "elsewhere", "train")
