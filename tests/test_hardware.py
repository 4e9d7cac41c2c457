"""Devices that this machine does not have, and what a peak of memory counts."""

import ctypes
import gc
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from helmholtz._hardware import INTERVAL, STATM, PeakMemory, usable_device
from helmholtz.cli.main import main
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.transformer import Transformer
from helmholtz.training.config import TrainConfig
from helmholtz.training.distributed import LAUNCHED, training_device
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


def test_of_the_gpus_that_are_there_none_is_touched(monkeypatch):
    """Every process of torchrun asks, before it knows its own: each would take memory of the first."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    asked = []

    def allocate(size, device):
        asked.append(device)
        raise RuntimeError("invalid device ordinal\nand much more")

    monkeypatch.setattr(torch, "empty", allocate)
    assert [usable_device("device", name).index for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == [
        None,
        None,
        0,
        1,
    ]
    assert not asked
    message = r"of this machine \(cpu, cuda, cuda:0, cuda:1\), got 'cuda:2': invalid device ordinal$"
    with pytest.raises(ValueError, match=message):
        usable_device("device", "cuda:2")


def test_torchrun_gives_each_process_its_own_gpu(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert training_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv(LAUNCHED, "id")
    assert training_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="train.device must be cuda under torchrun, .* got 'cuda:1'"):
        training_device("cuda:1")


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


MIB = 1 << 20
on_linux = pytest.mark.skipif(not STATM.exists(), reason="a system without /proc")


@on_linux
def test_a_memory_map_is_no_memory_and_a_tensor_that_is_gone_was(tmp_path):
    file = tmp_path / "tokens.bin"
    with file.open("wb") as out:
        out.truncate(256 * MIB)
    gc.collect()  # what earlier tests left would be freed in between, and hide what is allocated
    ctypes.CDLL(None).malloc_trim(0)
    with PeakMemory() as memory:
        before = memory.read()
        assert int(np.memmap(file, dtype=np.uint8, mode="r").sum()) == 0  # reads every page
        assert memory.read() - before < 32 * MIB
        tensor = torch.ones(64 * MIB // 4)  # a sum would hold two of them for a moment
        time.sleep(50 * INTERVAL)  # a busy machine may hold the sampling thread up
        del tensor
        assert 60 * MIB < memory.read() - before < 128 * MIB
    after = memory.read()
    kept = torch.zeros(256 * MIB // 4) + 1
    assert memory.read() == after and kept.any()  # closed


@on_linux
def test_a_small_child_of_a_big_parent_is_small():
    ballast = torch.zeros(512 * MIB // 4) + 1
    code = (
        "import importlib.util, sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
        "sys.modules['torch'].device = object; "
        "spec = importlib.util.spec_from_file_location('hardware', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "memory = module.PeakMemory().__enter__(); print(memory.read())"
    )
    path = sys.modules[PeakMemory.__module__].__file__
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, close_fds=False
    )
    assert ballast.any() and 0 < int(done.stdout) < 64 * MIB


def test_what_cannot_be_measured_is_not_a_number(monkeypatch, tmp_path):
    monkeypatch.setattr("helmholtz._hardware.STATM", tmp_path / "absent")
    with PeakMemory() as memory:
        assert memory.read() is None
    assert memory.read() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_of_a_cuda_device_its_allocations_count():
    with PeakMemory(torch.device("cuda")) as memory:
        before = memory.read()
        tensor = torch.zeros(64 * MIB // 4, device="cuda")
        del tensor
        assert memory.read() - before >= 64 * MIB


def test_a_run_reports_its_peak(data, tmp_path):
    with PeakMemory() as memory:
        before = memory.read()  # of a process that has run other tests
    train(tiny_run(data, tmp_path, steps=5))
    peak = json.loads((tmp_path / "summary.json").read_text())["peak_memory_bytes"]
    assert (30 * MIB < peak < before + 1024 * MIB) if STATM.exists() else peak is None
