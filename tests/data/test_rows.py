"""Sequences of ids as training data: nothing is added but the end of each row."""

import pytest
import torch

from helmholtz.data import DataConfig, IdTokenizer, TokenDataset, load_tokenizer, prepare, write_rows

TRAIN = torch.tensor([[3, 14, 15], [9, 2, 6]])
VALIDATION = torch.tensor([[5, 3]], dtype=torch.int32)


def test_a_folder_holds_the_rows_each_with_its_end(tmp_path):
    metadata = write_rows(tmp_path / "rows", TRAIN, VALIDATION, n_ids=16)
    train, validation = (TokenDataset(tmp_path / "rows", split) for split in ("train", "validation"))
    assert train.read(torch.tensor([0]), 8).tolist() == [[3, 14, 15, 16, 9, 2, 6, 16]]
    assert validation.read(torch.tensor([0]), 3).tolist() == [[5, 3, 16]]
    assert (train.vocab_size, train.eos_id, train.document_starts.tolist()) == (17, 16, [0, 4])
    assert train.n_bytes == len("3 14 15") + len("9 2 6")
    assert metadata.settings == DataConfig(tokenizer="ids").settings() == {"tokenizer": "ids"}
    assert load_tokenizer(train.tokenizer_folder).decode([3, 14, 15, 16]) == "3 14 15"


def test_the_same_rows_are_kept_and_others_need_a_word(tmp_path):
    folder = tmp_path / "rows"
    first = write_rows(folder, TRAIN, VALIDATION, n_ids=16)
    (folder / "beside.json").write_text("{}")
    assert write_rows(folder, TRAIN, VALIDATION, n_ids=16) == first
    assert (folder / "beside.json").exists()
    with pytest.raises(ValueError, match="holds other tokens"):
        write_rows(folder, TRAIN, VALIDATION, n_ids=17)
    assert TokenDataset(folder, "train").vocab_size == 17
    assert write_rows(folder, TRAIN, VALIDATION, n_ids=17, overwrite=True).vocab_size == 18
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds something else"):
        write_rows(other, TRAIN, VALIDATION, n_ids=16, overwrite=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TRAIN + 1, r"train must be in \[0, 16\), got 'ids from 3 to 16'"),
        (TRAIN - 3, r"train must be in \[0, 16\), got 'ids from -1 to 12'"),
        (TRAIN.float(), "train must be of an integer dtype"),
        (TRAIN > 3, "train must be of an integer dtype"),
        (TRAIN[0], r"train must be of a shape \(N, T\)"),
        (TRAIN[:0], r"train must be of a shape \(N, T\)"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "rows", rows, VALIDATION, n_ids=16)
    assert not (tmp_path / "rows").exists()


def test_ids_are_no_text_and_no_setting_of_text_is_taken_for_them(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be 'bytes' or 'bpe' for text"):
        prepare(DataConfig(folder=str(tmp_path / "rows"), tokenizer="ids"))
    for name, value in (("vocab_size", 17), ("sources", ("a.txt",)), ("seed", 1), ("split_by", "tail")):
        with pytest.raises(ValueError, match=f"{name}: got .*tokenizer='ids' takes rows as they are"):
            DataConfig(tokenizer="ids", **{name: value})


def test_ids_are_read_from_their_decimal_form():
    assert IdTokenizer(16).encode("3 14  15\n") == [3, 14, 15]
    for word in ("16", "x", "-1", "1.5"):
        with pytest.raises(ValueError, match=f"text must be ids below 16, got '{word}'"):
            IdTokenizer(16).encode(f"3 {word}")
