"""The two splits are a partition of the text, repeatable, of the wanted size, and never overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmholtz.data import Document, SplitRule, documents, shakespeare_files


def document(name, *pieces):
    return Document(name, len("".join(pieces).encode()), lambda: iter(pieces))


def parts(rule, doc):
    out = {"train": "", "validation": ""}
    for split, piece in rule.assign(doc):
        out[split] += piece
    return out["train"], out["validation"]


PIECES = st.lists(st.text(st.sampled_from("aé日🎭 \n"), min_size=1, max_size=30), min_size=1, max_size=5)


@given(pieces=PIECES, fraction=st.floats(0.01, 0.99))
def test_tail_is_a_partition_in_order(pieces, fraction):
    train, validation = parts(SplitRule("tail", fraction, 0), document("d", *pieces))
    assert train + validation == "".join(pieces)


@given(n_lines=st.integers(2, 60), per_piece=st.integers(1, 60), fraction=st.floats(0.1, 0.9))
def test_tail_cuts_at_the_end_of_the_line_that_the_fraction_falls_in(n_lines, per_piece, fraction):
    lines = ["ünd so weiter\n"] * n_lines
    pieces = ["".join(lines[i : i + per_piece]) for i in range(0, n_lines, per_piece)]
    doc, line = document("d", *pieces), len(lines[0].encode())
    train, validation = parts(SplitRule("tail", fraction, 0), doc)
    wanted = (1 - fraction) * doc.n_bytes
    assert abs(len(train.encode()) - wanted) <= line
    assert train.endswith("\n") == (round(wanted) <= doc.n_bytes - line)
    assert validation


def test_a_single_line_is_cut_within_and_not_within_a_character():
    train, validation = parts(SplitRule("tail", 0.5, 0), document("d", "日" * 5))
    assert (train, validation) == ("日" * 2, "日" * 3)  # byte 8 of 15 is within the third


@pytest.mark.parametrize("sizes", [(100,), (70, 30), (30,) * 3 + (10,)])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_longer_than_a_piece_is_cut_where_the_fraction_falls(sizes, end):
    pieces = ["x" * size for size in sizes]
    train, _ = parts(SplitRule("tail", 0.5, 0), document("d", *pieces[:-1], pieces[-1] + end))
    assert train == "x" * 50


def test_documents_go_wholly_to_one_split_in_the_wanted_proportion():
    rule = SplitRule("document", 0.1, 3)
    chosen = 0
    for i in range(2000):
        train, validation = parts(rule, document(f"file.jsonl:{i}", "some ", "text"))
        assert (train, validation) in [("some text", ""), ("", "some text")]
        chosen += bool(validation)
    assert 150 < chosen < 250  # mean 200, standard deviation 13


def test_the_split_of_a_document_depends_on_its_name_and_the_seed_alone():
    def chosen(seed):
        return [bool(parts(SplitRule("document", 0.3, seed), document(f"{i}", "x"))[1]) for i in range(50)]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    # a change of the hash would silently move text from training to validation in users' folders
    assert [i for i, c in enumerate(chosen(0)) if c][:5] == [3, 7, 8, 9, 11]


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_every_work_of_shakespeare_is_in_both_splits_in_proportion(fraction):
    rule = SplitRule("tail", fraction, 0)
    for work in documents(shakespeare_files()):
        train, validation = parts(rule, work)
        assert train.endswith("\n")
        assert len(validation.encode()) == pytest.approx(fraction * work.n_bytes, abs=120)
        assert validation
