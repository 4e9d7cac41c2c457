"""Datasets of the library ``datasets``, all of them on this disk: formats, splits, what is wrong with them."""

import json
import sys
from codecs import BOM_UTF8
from pathlib import Path

import pytest
import torch

from helmholtz.cli.main import main
from helmholtz.data import DataConfig
from helmholtz.interop.datasets import DatasetConfig, prepare_dataset

datasets = pytest.importorskip("datasets")

TRAIN = [f"train {i} \u00fc\nsecond line" for i in range(30)]
VALIDATION = [f"validation {i}" for i in range(7)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(texts):
    return datasets.Dataset.from_dict({"number": list(range(len(texts))), "text": texts})


def write(folder, form, name, texts):
    """The file of one split, in any format."""
    path = folder / f"{name}.{form}"
    if form == "json":
        path.write_text("".join(json.dumps({"text": text, "more": [1]}) + "\n" for text in texts))
    elif form == "csv":
        rows(texts).to_csv(path)
    elif form == "parquet":
        rows(texts).to_parquet(path)
    else:
        path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts))
    return str(path)


def contents(dataset, tokenizer):
    stream = dataset.read(torch.tensor([0]), len(dataset))[0].tolist()
    ends = [*dataset.document_starts.tolist()[1:], len(stream)]
    return [
        tokenizer.decode(stream[a:b]) for a, b in zip(dataset.document_starts.tolist(), ends, strict=True)
    ]


def prepared(tmp_path, data=None, **dataset):
    config = DataConfig(folder=str(tmp_path / "tokens"), tokenizer="bytes", **data or {})
    return prepare_dataset(config, DatasetConfig(**dataset))


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "text"])
def test_local_files_with_a_validation_split(tmp_path, form):
    train, validation = write(tmp_path, form, "one", TRAIN), write(tmp_path, form, "two", VALIDATION)
    data = prepared(tmp_path, path=form, data_files=(train,), validation_files=(validation,))
    wanted = [text.replace("\n", " ") for text in TRAIN] if form == "text" else TRAIN
    assert contents(data.train, data.tokenizer) == wanted
    assert contents(data.validation, data.tokenizer) == VALIDATION
    assert data.metadata.split_by == "source"
    assert not list((tmp_path / "cache").rglob("*.arrow")) and not (tmp_path / ".tokens.texts").exists()


@pytest.mark.parametrize("form", ["json", "csv", "text", "folder"])
def test_a_byte_order_mark_is_no_text(tmp_path, form):
    (tmp_path / "files").mkdir()
    written = write(tmp_path / "files", "text" if form == "folder" else form, "train", TRAIN)
    path = tmp_path / "files" / f"train.{'txt' if form == 'folder' else form}"
    path.write_bytes(BOM_UTF8 + Path(written).read_bytes())
    if form == "folder":
        Path(written).unlink()
    given = {"path": str(path.parent)} if form == "folder" else {"path": form, "data_files": (str(path),)}
    data = prepared(tmp_path, {"validation_fraction": 0.3, "split_by": "tail"}, **given)
    found = [
        a + b
        for a, b in zip(*(contents(d, data.tokenizer) for d in (data.train, data.validation)), strict=True)
    ]
    assert found == ([text.replace("\n", " ") for text in TRAIN] if form in ("text", "folder") else TRAIN)


def test_without_a_validation_split_a_part_of_the_text_is_kept(tmp_path):
    path = write(tmp_path, "json", "all", TRAIN)
    data = prepared(
        tmp_path, {"validation_fraction": 0.3, "split_by": "document"}, path="json", data_files=(path,)
    )
    train, validation = (contents(split, data.tokenizer) for split in (data.train, data.validation))
    assert sorted(train + validation) == sorted(TRAIN) and len(train) > len(validation) > 0
    assert data.metadata.split_by == "document"


@pytest.mark.parametrize("several", [True, False])
def test_a_folder_of_save_to_disk(tmp_path, several):
    saved = {"train": rows(TRAIN), "dev": rows(VALIDATION)}
    (datasets.DatasetDict(saved) if several else saved["train"]).save_to_disk(tmp_path / "saved")
    chosen = {"validation_split": "dev"} if several else {}
    data = prepared(tmp_path, path=str(tmp_path / "saved"), **chosen)
    if several:
        assert contents(data.train, data.tokenizer) == TRAIN
        assert contents(data.validation, data.tokenizer) == VALIDATION
    else:
        assert data.metadata.split_by == "tail" and data.train.n_bytes > data.validation.n_bytes
    with pytest.raises(
        ValueError, match=r"dataset.name must be left out: .*saved was written by save_to_disk"
    ):
        prepared(tmp_path, path=str(tmp_path / "saved"), name="en")


def test_a_folder_of_files_other_splits_and_another_column(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, texts in (("train", TRAIN), ("test", VALIDATION)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    data = prepared(
        tmp_path, {"text_field": "body"}, path=str(folder), split="test", validation_split="train"
    )
    assert contents(data.train, data.tokenizer) == VALIDATION
    assert contents(data.validation, data.tokenizer) == TRAIN


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(path, name, **options):
        asked.update(path=path, name=name, **options)
        return datasets.DatasetDict({"train": rows(TRAIN)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    files = {"data_files": ("a/*.parquet",), "validation_files": ("b.parquet",)}
    data = prepared(tmp_path, path="someone/texts", name="en", revision="abc", **files)
    split = {"train": ["a/*.parquet"], "validation": ["b.parquet"]}
    wanted = {
        "path": "someone/texts",
        "name": "en",
        "revision": "abc",
        "data_files": split,
        "streaming": True,
    }
    assert asked == wanted
    assert data.metadata.split_by == "tail"


def test_a_validation_split_that_trains_is_divided(tmp_path):
    train, validation = write(tmp_path, "json", "one", TRAIN), write(tmp_path, "json", "two", VALIDATION)
    data = prepared(
        tmp_path,
        {"validation_fraction": 0.3, "split_by": "document"},
        path="json",
        data_files=(train,),
        validation_files=(validation,),
        split="validation",
    )
    found = [text for split in (data.train, data.validation) for text in contents(split, data.tokenizer)]
    assert sorted(found) == sorted(VALIDATION)


def test_a_row_that_is_no_text_is_named_by_its_number(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ["one", "two", None, "three"]})
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="dataset row 2: column 'text' must hold a string, got NoneType"):
        prepared(tmp_path, path=str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("dataset", "data", "message"),
    [
        ({"split": "trian"}, {}, r"dataset.split: no split 'trian'; did you mean 'train'\? \(splits: train"),
        ({"validation_split": "dev"}, {}, "dataset.validation_split: no split 'dev'"),
        ({}, {"text_field": "txt"}, r"no column 'txt'; did you mean 'text'\? \(columns: text, more\)"),
        ({}, {"text_field": "more"}, "dataset row 0: column 'more' must hold a string, got list"),
        ({}, {"seed": 3}, "data.seed: got 3, but the dataset's split 'validation' validates"),
        ({"data_files": ("nothing*.json",)}, {}, r"dataset.data_files: no file 'nothing\*.json'"),
        ({"path": "jsn"}, {}, "dataset: jsn cannot be read: "),
    ],
)
def test_a_mistake_is_named_and_nothing_is_left(tmp_path, dataset, data, message):
    files = (write(tmp_path, "json", "train", TRAIN),)
    given = {
        "path": "json",
        "data_files": files,
        "validation_files": (write(tmp_path, "json", "v", VALIDATION),),
    }
    with pytest.raises(ValueError, match=message) as error:
        prepared(tmp_path, data, **given | dataset)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "tokens" in path.name]


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": 3, \n', "\x00\x01\x02", '{"text": "\ud800"}\n'])
def test_damaged_rows_are_an_error_and_nothing_is_left(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="dataset: .* cannot be read: "):
        prepared(tmp_path, path="json", data_files=(str(path),))
    assert not [path for path in tmp_path.iterdir() if "tokens" in path.name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_files": ("a",)}, "dataset.data_files must be left out without dataset.path"),
        ({"split": "test"}, "dataset.split must be left out without dataset.path, got 'test'"),
        ({"path": "json"}, "dataset.data_files must be given with path='json'"),
        ({"path": "json", "data_files": "a"}, "dataset.data_files must be a list of paths"),
        (
            {"path": "json", "validation_files": ("a",)},
            "dataset.data_files must be given with validation_files",
        ),
        ({"path": "squad", "validation_split": "train"}, "dataset.validation_split must be another split"),
    ],
)
def test_a_contradictory_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**fields)


def test_the_command_line_and_a_config_file(tmp_path, capsys):
    train, validation = write(tmp_path, "csv", "one", TRAIN), write(tmp_path, "csv", "two", VALIDATION)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {{folder: {tmp_path / 'tokens'}, tokenizer: bytes}}\n"
        f"dataset: {{path: csv, data_files: [{train}], validation_files: [{validation}]}}\n"
    )
    assert main(["data", f"--config={file}"]) == 0
    out = capsys.readouterr().out
    assert "prepared, vocabulary 257, split by source" in out and "7 documents" in out
    assert main(["data", f"--config={file}"]) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["data", f"--config={file}", "--dataset.split=trian"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["data", f"--config={file}", f"--data.sources=[{train}]"]) == 2
    assert "sources must be empty" in capsys.readouterr().err


def test_the_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'helmholtz-nn\[data\]'"):
        prepared(tmp_path, path="squad")
