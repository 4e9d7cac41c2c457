"""Building and choosing kernels: what happens without a compiler, with a broken one, in a cache nobody can write."""

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helmholtz import kernels
from helmholtz.cli.main import main
from helmholtz.kernels import build as building
from helmholtz.kernels import gpu
from helmholtz.ops import first_order_scan
from interpreted import INTERPRETED

built = pytest.mark.skipif(not kernels.LOADED and not INTERPRETED, reason="the kernels are not built")
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


@pytest.mark.parametrize("variable, value", [("CXX", "no-such-compiler -O1"), ("PATH", "/nowhere")])
def test_without_a_compiler_the_remedy_is_told(cache, monkeypatch, capsys, variable, value):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    assert main(["kernels", "build"]) == 2
    said = capsys.readouterr()
    assert "no C++ compiler found" in said.err and not said.out
    assert ("CXX=no-such-compiler -O1" if variable == "CXX" else "CXX names another") in said.err
    assert main(["kernels"]) == 0
    assert "none found" in capsys.readouterr().out


def test_the_compiler_may_have_options(cache, tmp_path, monkeypatch):
    compiler_that(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "compiler --sysroot='/a folder'")
    assert building.compiler() == [str(tmp_path / "compiler"), "--sysroot=/a folder"]


def test_a_build_that_fails_shows_the_last_lines_and_leaves_nothing(cache, tmp_path, monkeypatch, capsys):
    broken = compiler_that(tmp_path, "for i in $(seq 40); do echo line $i >&2; done; exit 3")
    monkeypatch.setenv("CXX", broken)
    assert main(["kernels", "build"]) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    assert lines == [f"line {i}" for i in range(29, 41)]
    assert f"{broken} failed (3); the plain forms are used" in error
    assert not list(cache.iterdir())


@pytest.mark.parametrize("flag", ["-c", "-shared"])
def test_every_compiler_and_the_linker_must_succeed(cache, tmp_path, monkeypatch, capsys, flag):
    part = "case $x in *attention.cpp) exit 4;; esac" if flag == "-c" else f"[ $x != {flag} ] || exit 4"
    monkeypatch.setenv("CXX", compiler_that(tmp_path, f'for x in "$@"; do {part}; done; echo > "$x"'))
    assert main(["kernels", "build"]) == 2
    assert "failed (4)" in capsys.readouterr().err
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_no_two_kernels_define_one_name(tmp_path):
    """Of two functions alike, in files that are compiled apart, a linker takes one without a word."""
    compiler = building.compiler()
    if compiler is None:
        pytest.skip("there is no compiler")
    file = tmp_path / "all.cpp"
    file.write_text("".join(f'#include "{header}"\n' for header in sorted(building.SOURCES.glob("*.h"))))
    command = [*compiler, *building._options(), *building._headers(), "-fsyntax-only", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_what_cannot_be_loaded_is_not_kept(cache, tmp_path, monkeypatch, capsys):
    """It would end every process at its start."""
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo half > $2'))
    assert main(["kernels", "build"]) == 2
    error = capsys.readouterr().err
    assert "file too short" in error and "loading what was built failed" in error
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", compiler_that(tmp_path, "exit 0"))
    assert main(["kernels", "build"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "HELMHOLTZ_CACHE names another folder" in line


def test_a_cache_that_cannot_be_looked_into_holds_no_kernels(cache, monkeypatch):
    """As with another user's HOME, whose folders are closed."""

    stat = os.stat

    def refused(path: os.PathLike[str], **options: bool) -> os.stat_result:
        if cache in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    cache.mkdir()
    building.library_file().write_text("no library")
    assert building.find_library()
    monkeypatch.setattr(os, "stat", refused)
    assert not building.load()


def test_a_user_without_a_home_has_no_kernels(monkeypatch, capsys):
    def refused(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HELMHOLTZ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(refused))
    assert not building.load()
    assert main(["kernels"]) == 0 and main(["kernels", "build"]) == 2
    said = capsys.readouterr()
    assert all("no folder for kernels" in text and "HELMHOLTZ_CACHE" in text for text in said)


def test_two_processes_build_at_once(cache, tmp_path):
    """Each makes a whole file; the last one stays."""
    whole = Path(torch.__file__).parent / "lib" / "libc10.so"
    script = f'while [ "$1" != -o ]; do shift; done; echo half > $2; sleep 0.3; cp {whole} $2'
    env = os.environ | {"CXX": compiler_that(tmp_path, script)}
    code = "from helmholtz.kernels import build; print(build.build())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, env=env) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in both}
    (file,) = cache.iterdir()
    assert found == {str(file)} and file.read_bytes() == whole.read_bytes()


def test_what_a_killed_build_left_is_removed_by_a_later_one(cache, tmp_path, monkeypatch, capsys):
    """A signal that ends a process at once leaves its parts; those of a build that still runs stay."""
    monkeypatch.setenv("CXX", compiler_that(tmp_path, "exit 1"))
    for name, age in [("old", 2 * building.ABANDONED), ("new", 0)]:
        parts = cache / f"{building.PARTS}{name}"
        parts.mkdir(parents=True)
        (parts / "scan.o").write_text("half")
        os.utime(parts, (time.time() - age,) * 2)
    assert main(["kernels", "build"]) == 2 and "failed (1)" in capsys.readouterr().err
    assert [folder.name for folder in cache.iterdir()] == [f"{building.PARTS}new"]


def test_another_torch_another_processor_and_other_sources_are_another_file(cache, monkeypatch):
    names = {building.library_file().name}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SOMETHING")
    names.add(building.library_file().name)
    monkeypatch.setattr(torch, "__version__", "1.0")
    names.add(building.library_file().name)
    monkeypatch.setattr(torch.version, "git_version", "of another build")
    names.add(building.library_file().name)
    monkeypatch.setattr(building, "FLAGS", ["-O0"])
    names.add(building.library_file().name)
    monkeypatch.setattr(building, "SOURCES", Path(building.__file__).parent)
    names.add(building.library_file().name)
    assert len(names) == 6


def test_a_damaged_library_is_an_error_with_the_remedy(cache):
    cache.mkdir()
    building.library_file().write_text("no library")
    code = "import helmholtz.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode and "remove it and run: helmholtz kernels build" in done.stderr
    env = os.environ | {"HELMHOLTZ_KERNELS": "plain"}
    assert not subprocess.run([sys.executable, "-c", code], env=env).returncode


def test_a_part_of_a_library_is_an_error_and_no_crash(cache):
    cache.mkdir()
    whole = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    building.library_file().write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="the file is not whole; remove it and run"):
        building.load()


@pytest.mark.parametrize("place", ["environment", "context"])
def test_kernels_are_switched_off(place, monkeypatch):
    if place == "environment":
        code = "from helmholtz import kernels; print(kernels.usable('scan'), kernels.refusal())"
        env = os.environ | {"HELMHOLTZ_KERNELS": "plain"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.startswith("False")
        return
    with kernels.plain_forms():
        assert not kernels.usable("scan", X)
    assert kernels.usable("scan", X) == kernels.LOADED


def test_a_process_older_than_its_kernels_says_what_it_uses(monkeypatch):
    monkeypatch.setattr(kernels, "_plain", False)
    monkeypatch.setattr(kernels, "LOADED", False)
    refusal = kernels.refusal()
    assert not kernels.usable("scan", X) and refusal is not None and "when this process began" in refusal


def test_an_unknown_switch_is_no_switch():
    env = os.environ | {"HELMHOLTZ_KERNELS": "off"}
    code = "import helmholtz_program; raise SystemExit(helmholtz_program.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "HELMHOLTZ_KERNELS must be one of" in line


@built
def test_transforms_and_other_devices_take_the_plain_forms():
    assert kernels.usable("scan", X, None) and not kernels.usable("scan", X, torch.empty(1, device="meta"))
    seen = torch.func.vmap(lambda x: torch.tensor(kernels.usable("scan", x)))(X)
    assert not seen.any()
    with torch.autograd.forward_ad.dual_level():
        assert not kernels.usable("scan", X)


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
    "attention_step": lambda: (
        torch.rand(2, 1, 32), torch.rand(2, 1, 4), torch.rand(2, 1, 4), torch.rand(2, 2, 9, 4), torch.rand(2, 2, 9, 4),
        torch.rand(2, 6) < 0.7, 5, 4,
    ),
    "softmax_step": lambda: (
        torch.rand(2, 1, 16), torch.rand(2, 1, 8), torch.rand(2, 1, 6), torch.rand(2, 3), torch.rand(2, 1, 4),
        torch.rand(2, 1, 4), torch.rand(2, 2, 9, 4), torch.rand(2, 2, 9, 3), torch.rand(2, 6) < 0.7, 5, 40.0,
    ),
    "ssd_step": lambda: (
        torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3), -torch.rand(3), torch.rand(2, 1, 5), torch.rand(2, 1, 5),
        torch.rand(3), torch.rand(2, 1, 3, 4), torch.rand(2, 3, 4, 5), False,
    ),
    "causal_conv": lambda: (
        leaf(2, 5, 8)[..., 1:4], leaf(3, 4), leaf(3), leaf(2, 3, 3), torch.rand(2, 5) < 0.7, torch.rand(2, 5) < 0.3,
        True,
    ),
    "scan": lambda: (leaf(2, 5, 6)[..., :3], leaf(2, 5, 3), leaf(2, 3), True),
    "gated_read": lambda: (
        leaf(2, 3, 5, 2, 4).transpose(1, 2), leaf(3, 4), leaf(2, 5, 24)[..., :12].unflatten(-1, (3, 4)),
        leaf(2, 5, 12), None, 1e-6,
    ),
    "modulate": lambda: (leaf(2, 5, 6), leaf(2, 5, 6), [1, 3, 2]),
    "tilt": lambda: (leaf(2, 5, 24)[..., 4:16].unflatten(-1, (3, 4)).transpose(1, 2), leaf(3, 4), 0.5, True),
    "rnn_softmax": lambda: (leaf(2, 5, 3), leaf(2, 5, 2, 3), torch.zeros(2, 3), leaf(2, 3, 3), torch.rand(2, 5) < 0.5),
    "rope_table": lambda: (torch.tensor([[0, 3], [7, 1000]]).T, 6, 100.0),
    "sample": lambda: (torch.randn(3, 7), torch.rand(3, 1, dtype=torch.float64), 0.5, 4, 0.9),
    "linear_attention": lambda: (
        leaf(2, 70, 3, 4).transpose(1, 2), leaf(2, 1, 70, 4).expand(-1, 3, -1, -1), leaf(2, 3, 70, 5), -leaf(2, 3, 70),
        leaf(2, 3, 4, 6), False, True,
    ),
    "softmax_read": lambda: (
        leaf(2, 5, 4, 3).transpose(1, 2), leaf(2, 2, 7, 3), leaf(2, 2, 7, 6)[..., :3], leaf(2, 3),
        torch.rand(2, 7) < 0.7, None, True, 40.0,
    ),
    "selective_scan": lambda: (
        leaf(2, 40, 2, 3, 2).transpose(2, 3), leaf(2, 40, 4), leaf(4, 5), leaf(2, 40, 5), leaf(2, 40, 5), leaf(4),
        leaf(2, 4, 4, 5), None, True,
    ),
    "rms_norm": lambda: (leaf(2, 5, 3).bfloat16(), leaf(3), 1e-6),
    "swiglu": lambda: (leaf(3, 2048),),
    "rope": lambda: (leaf(2, 5, 7, 4), torch.rand(5, 4), torch.rand(5, 4), 3, 2, True),
    "code_lookup": lambda: (leaf(8, 4), torch.tensor([[0, 7, 3]]), leaf(1, 3, 3)),
    "linear_step": lambda: (
        torch.rand(2, 1, 12), torch.rand(2, 1, 12), torch.rand(2, 1, 3, 2).transpose(1, 2), torch.rand(2, 1, 3),
        torch.rand(3, 2), torch.rand(2, 1, 4), torch.rand(2, 1, 4), torch.rand(2, 3, 4, 5), 1e-6, 40.0, 16.0,
    ),
    "rnn_softmax_step": lambda: (
        torch.rand(2, 1, 12), torch.rand(2, 1, 3, 4).transpose(1, 2), torch.rand(3, 4), torch.rand(2, 1, 4),
        torch.rand(2, 1, 4), torch.rand(2, 12), torch.rand(2, 3, 12), 40.0,
    ),
    "selective_step": lambda: (
        torch.rand(2, 1, 3, 2).transpose(1, 2), torch.rand(2, 1, 6), torch.rand(2, 1, 5), torch.rand(2, 1, 5),
        torch.rand(6, 5), torch.rand(6), torch.rand(3, 2), torch.rand(2, 3, 6, 5), 1e-6, 40.0,
    ),
    "rope_step": lambda: ([torch.rand(2, 1, 12), torch.rand(2, 1, 4)], torch.rand(2, 1, 4), torch.rand(2, 1, 4)),
    "token_energy": lambda: (
        *(torch.rand(5, 3) for _ in range(2)), *(torch.rand(5, 4) for _ in range(4)), torch.rand(5, 6),
        torch.tensor([0, 0, -torch.inf, 0, 0, 0]), torch.rand(1), torch.rand(1), 2.0,
    ),
    "cross_entropy": lambda: (leaf(5, 7), torch.tensor([0, 6, -100, 2, 2]), -100),
}  # fmt: skip


HERE = [name for name in OPERATORS if not INTERPRETED or name in gpu.MODULES]
"""Those that have a kernel in this process."""
TRAINED = [name for name in HERE if hasattr(torch.ops.helmholtz, f"{name}_backward")]


def test_every_operator_has_a_call():
    assert OPERATORS.keys() == set(kernels.NAMES)


def test_every_operator_is_in_the_table_of_the_documents():
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    (table,) = re.findall(r"\| operator `helmholtz::` .*\n((?:\|.*\n)+)", text)
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(kernels.NAMES)


@built
@pytest.mark.compile
@pytest.mark.parametrize("name", HERE)
def test_an_operator_is_what_torch_wants_of_one(name):
    operator = getattr(torch.ops.helmholtz, name).default
    inputs = [
        x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in OPERATORS[name]()
    ]
    done = torch.library.opcheck(operator, inputs)
    assert set(done.values()) == {"SUCCESS"}


@built
@pytest.mark.parametrize("name", TRAINED)
def test_no_second_derivative_is_silently_left_out(name):
    """Of any pair: a backward operator that did not take an input could not know that its gradients depend on it."""
    inputs = OPERATORS[name]()
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    done = [x for x in tree_leaves(getattr(torch.ops.helmholtz, name)(*inputs)) if x.requires_grad]
    first = torch.autograd.grad(sum(x.square().sum() for x in done), leaves, create_graph=True)
    for x in leaves:
        with pytest.raises(RuntimeError, match="derivative for helmholtz::.*_backward is not implemented"):
            torch.autograd.grad(sum(g.square().sum() for g in first), x, retain_graph=True)


NO_VALUE = ("code_lookup", 2)
"""The logits of a code have a gradient and change no value."""


@built
@pytest.mark.parametrize("name", [name for name in HERE if name != "sample"])  # its output is of integers
def test_what_is_not_a_number_is_not_hidden(name):
    """Neither by a comparison, nor where nothing else is left to read."""
    for i, x in enumerate(OPERATORS[name]()):
        if torch.is_tensor(x) and x.is_floating_point() and (name, i) != NO_VALUE:
            inputs = [*OPERATORS[name]()]
            inputs[i] = torch.full_like(x, torch.nan)
            done = tree_leaves(getattr(torch.ops.helmholtz, name)(*inputs))
            assert any(y.isnan().any() for y in done), i


LAYOUTS = {
    "expanded last": lambda x: x[..., :1].expand(x.shape),
    "expanded first": lambda x: x[:1].expand(x.shape),
    "expanded in the middle": lambda x: x[:, :1].expand(x.shape) if x.dim() > 1 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "last two transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "spread": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
NARROW = {  # a last dimension of 1, which may have any stride
    "gated_read": lambda: (leaf(2, 5, 3, 2, 1), leaf(3, 1), leaf(2, 5, 3, 1), leaf(2, 5, 3, 1), leaf(2, 5, 3, 1), 1e-6),
    "tilt": lambda: (leaf(2, 3, 5, 1), leaf(3, 1), 0.5, False),
    "linear_attention": lambda: (
        leaf(2, 3, 70, 1), leaf(2, 3, 70, 1), leaf(2, 3, 70, 1), None, leaf(2, 3, 1, 1), True, False,
    ),
    "softmax_read": lambda: (
        leaf(2, 4, 9, 1), leaf(2, 2, 9, 1), leaf(2, 2, 9, 1), leaf(2, 1), None, torch.tensor([0, 4, 9]), True, 40.0,
    ),
    "causal_conv": lambda: (leaf(2, 5, 1), leaf(1, 4), leaf(1), leaf(2, 3, 1), None, None, False),
    "modulate": lambda: (leaf(2, 5, 1), leaf(2, 5, 1), [1]),
    "rope": lambda: (leaf(2, 5, 3, 2), torch.rand(5, 2), torch.rand(5, 2), 3, 0, False),  # of 2, without keys
}  # fmt: skip
APART = ("sample", "attention_step", "softmax_step")
"""What draws by place and what writes to a cache."""
WIDTHS = {name: make for name, make in OPERATORS.items() if name in HERE and name not in APART}


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, make",
    [*WIDTHS.items(), *((name, make) for name, make in NARROW.items() if name in HERE)],
    ids=[*WIDTHS, *(f"{name} of width 1" for name in NARROW if name in HERE)],
)
def test_strides_change_nothing(name, make, layout):
    """Of inputs and of the gradients of outputs: results are those for the same numbers side by side."""

    def found(lay: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        inputs = [lay(x) if torch.is_tensor(x) else x for x in make()]
        leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        done = tree_leaves(getattr(torch.ops.helmholtz, name)(*inputs))
        differentiable = [x for x in done if x.requires_grad]
        if not leaves:
            return done
        return done + [
            *torch.autograd.grad(differentiable, leaves, [lay(torch.rand_like(x)) for x in differentiable])
        ]

    def lay(x: torch.Tensor) -> torch.Tensor:
        return LAYOUTS[layout](x) if x.dim() else x

    for strided, whole in zip(found(lay), found(lambda x: lay(x).contiguous()), strict=True):
        if name == "code_lookup":  # its product is torch's, which rounds by how a matrix lies
            torch.testing.assert_close(strided, whole)
        else:
            assert torch.equal(strided, whole)
