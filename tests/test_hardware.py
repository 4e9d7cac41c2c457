"""A device that this machine does not have is an error in one line, wherever it is named."""

import pytest
import torch

from helmholtz._hardware import usable_device
from helmholtz.cli.main import main
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.transformer import Transformer
from helmholtz.training.config import TrainConfig
from helmholtz.training.run import prepare, train
from tiny_runs import prepare_text, tiny_run

ABSENT = ["cuda:99", "nonsense", "xpu:3", "cuda:-1", ""]
if not torch.cuda.is_available():
    ABSENT += ["cuda", "cuda:0"]
if not torch.backends.mps.is_available():
    ABSENT += ["mps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(Transformer(tiny_run(data, folder).model), folder)
    return folder


def test_a_device_that_is_there_is_taken():
    assert (
        usable_device("device", "cpu") == usable_device("device", torch.device("cpu")) == torch.device("cpu")
    )


@pytest.mark.parametrize("device", ABSENT)
def test_a_device_that_is_absent_is_named_with_those_that_are_there(checkpoint, device):
    with pytest.raises(
        ValueError, match=rf"device must be a device of this machine \(cpu.*\), got '{device}'"
    ) as said:
        load_checkpoint(checkpoint, device)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("device", ABSENT)
def test_training_on_a_device_that_is_absent_is_refused_in_one_line(data, tmp_path, capsys, device):
    folder = tmp_path / "run"
    options = [f"--data.folder={data.folder}", "--data.tokenizer=bytes", "--data.validation_fraction=0.1"]
    options += ["--train.seq_len=16", f"--train.device={device}", f"--train.output_dir={folder}"]
    for extra in ([], ["--dry-run"]):
        assert main(["train", *options, *extra]) == 2
        said = capsys.readouterr().err
        assert "train.device must be" in said and f"got '{device}'" in said
        assert said.count("\n") == 1
    assert not folder.exists()


def test_training_by_the_library_says_the_same(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", device="cuda:99")
    for begin in (train, prepare):
        with pytest.raises(ValueError, match="train.device must be a device of this machine"):
            begin(config)
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_on_another_gpu():
    one, two = (TrainConfig(device=f"cuda:{n}").numerics() for n in (0, 1))
    assert one == two == TrainConfig(device="cuda").numerics()
