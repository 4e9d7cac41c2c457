"""Building and choosing kernels: what happens without a compiler, with a broken one, in a cache nobody can write."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helmholtz import kernels
from helmholtz.cli.main import main
from helmholtz.kernels import build as building
from helmholtz.ops import first_order_scan

built = pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
DECAY, X = torch.rand(1, 4, 2), torch.rand(1, 4, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler_that(folder: Path, script: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_without_a_compiler_the_remedy_is_told(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["kernels", "build"]) == 2
    assert "no C++ compiler found" in capsys.readouterr().err
    assert main(["kernels"]) == 0
    assert "none found" in capsys.readouterr().out


def test_a_build_that_fails_shows_the_last_lines_and_leaves_nothing(cache, tmp_path, monkeypatch, capsys):
    broken = compiler_that(tmp_path, "for i in $(seq 40); do echo line $i >&2; done; exit 3")
    monkeypatch.setenv("CXX", broken)
    assert main(["kernels", "build"]) == 2
    error = capsys.readouterr().err
    assert "failed (3)" in error and "line 40" in error and "line 28" not in error
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", compiler_that(tmp_path, "exit 0"))
    assert main(["kernels", "build"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_two_processes_build_at_once(cache, tmp_path):
    """Each makes a whole file; the last one stays."""
    script = 'while [ "$1" != -o ]; do shift; done; echo half > $2; sleep 0.3; echo whole > $2'
    env = os.environ | {"CXX": compiler_that(tmp_path, script)}
    code = "from helmholtz.kernels import build; print(build.build())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, env=env) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in both}
    (file,) = cache.iterdir()
    assert found == {str(file)} and file.read_text() == "whole\n"


def test_another_torch_another_processor_and_other_sources_are_another_file(cache, monkeypatch):
    names = {building.library_file().name}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SOMETHING")
    names.add(building.library_file().name)
    monkeypatch.setattr(torch, "__version__", "1.0")
    names.add(building.library_file().name)
    monkeypatch.setattr(building, "SOURCES", Path(building.__file__).parent)
    names.add(building.library_file().name)
    assert len(names) == 4


def test_a_damaged_library_is_an_error_with_the_remedy(cache):
    cache.mkdir()
    building.library_file().write_text("no library")
    code = "import helmholtz.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode and "remove it and run: helmholtz kernels build" in done.stderr


@pytest.mark.parametrize("place", ["environment", "context"])
def test_kernels_are_switched_off(place, monkeypatch):
    if place == "environment":
        code = "from helmholtz import kernels; print(kernels.usable(), kernels.refusal())"
        env = os.environ | {"HELMHOLTZ_KERNELS": "plain"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.startswith("False")
        return
    with kernels.plain_forms():
        assert not kernels.usable(X)
    assert kernels.usable(X) == kernels.LOADED


def test_an_unknown_switch_is_no_switch():
    env = os.environ | {"HELMHOLTZ_KERNELS": "off"}
    code = "import helmholtz_program; raise SystemExit(helmholtz_program.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "HELMHOLTZ_KERNELS must be one of" in line


@built
def test_transforms_and_other_devices_take_the_plain_forms():
    assert kernels.usable(X, None) and not kernels.usable(X, torch.empty(1, device="meta"))
    seen = torch.func.vmap(lambda x: torch.tensor(kernels.usable(x)))(X)
    assert not seen.any()
    with torch.autograd.forward_ad.dual_level():
        assert not kernels.usable(X)


@built
def test_threads_change_no_bit():
    x = torch.rand(3, 50, 70, requires_grad=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h, _ = first_order_scan(torch.sigmoid(x), x)
        found.append((h, torch.autograd.grad(h.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


def leaf(*shape: int) -> torch.Tensor:
    return torch.rand(*shape).requires_grad_()


OPERATORS = {
    "causal_conv": lambda: (
        leaf(2, 5, 8)[..., 1:4], leaf(3, 4), leaf(3), leaf(2, 3, 3), torch.rand(2, 5) < 0.7, torch.rand(2, 5) < 0.3,
        True,
    ),
    "scan": lambda: (leaf(2, 5, 3), leaf(2, 5, 3), leaf(2, 3)),
    "gated_read": lambda: (
        leaf(2, 3, 5, 2, 4).transpose(1, 2), leaf(3, 4), leaf(2, 5, 24)[..., :12].unflatten(-1, (3, 4)),
        leaf(2, 5, 3, 4), 1e-6,
    ),
    "rnn_softmax": lambda: (leaf(2, 5, 3), leaf(2, 5, 2, 3), torch.zeros(2, 3), leaf(2, 3, 3), torch.rand(2, 5) < 0.5),
    "rope_table": lambda: (torch.tensor([[0, 3], [7, 1000]]).T, 6, 100.0),
    "segment_decays": lambda: (leaf(2, 8, 3).transpose(1, 2),),
    "selective_scan": lambda: (
        leaf(2, 40, 2, 3), leaf(2, 40, 3), leaf(3, 4), leaf(2, 40, 4), leaf(2, 40, 4), leaf(2, 2, 3, 4), None,
    ),
}  # fmt: skip


def test_every_operator_has_a_call():
    assert OPERATORS.keys() == set(kernels.NAMES)


@built
@pytest.mark.compile
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_what_torch_wants_of_one(name):
    operator = getattr(torch.ops.helmholtz, name).default
    inputs = [
        x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in OPERATORS[name]()
    ]
    done = torch.library.opcheck(operator, inputs)
    assert set(done.values()) == {"SUCCESS"}
