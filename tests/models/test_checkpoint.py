"""Checkpoints: exact round trips, no moment without a complete one, clear errors for damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helmholtz import _files
from helmholtz._files import atomic_folder, complete_folder
from helmholtz.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.transformer import TransformerConfig

TOKENS = torch.arange(12).view(2, 6)


def test_a_round_trip_is_bit_equal(model: Decoder, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "a")
    random_state = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "a")
    assert torch.equal(random_state, torch.get_rng_state())
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert (loaded.unembed.weight is loaded.embed.weight) == model.config.tie_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_tied_weights_are_stored_once(transformer: Decoder, tmp_path: Path) -> None:
    save_checkpoint(transformer, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert "embed.weight" in stored and "unembed.weight" not in stored


def test_saving_again_gives_the_same_bytes(model: Decoder, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "a")
    save_checkpoint(load_checkpoint(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dtypes_are_kept_or_converted(transformer: Decoder, tmp_path: Path) -> None:
    narrow = transformer.to(torch.bfloat16)
    save_checkpoint(narrow, tmp_path / "a")
    kept = load_checkpoint(tmp_path / "a")
    assert torch.equal(kept(TOKENS).logits, narrow(TOKENS).logits)
    wide = load_checkpoint(tmp_path / "a", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide.unembed.weight is wide.embed.weight


def _edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        description = json.loads((folder / "config.json").read_text())
        change(description)
        (folder / "config.json").write_text(json.dumps(description))

    return damage


def _retensor(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "no folder": (shutil.rmtree, "config.json: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "truncated": (_truncate, "model.safetensors: damaged or not a safetensors file"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: damaged"),
    "not json": (lambda f: (f / "config.json").write_text('{"arch'), "config.json: not valid JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not valid JSON"),
    "no keys": (lambda f: (f / "config.json").write_text("[]"), "config.json: wanted the keys"),
    "architecture": (
        _edit(lambda d: d.update(architecture="transfomer")),
        "config.json: architecture must be one of .*'transfomer'; did you mean 'transformer'",
    ),
    "unknown key": (
        _edit(lambda d: d["config"].update(n_head=4)),
        "config.json: TransformerConfig has no key 'n_head'; did you mean 'n_heads'",
    ),
    "bad value": (_edit(lambda d: d["config"].update(n_heads=5)), "config.json: n_heads must divide d_model"),
    "missing tensor": (
        _retensor(lambda t: t.pop("norm.weight")),
        "model.safetensors: tensor 'norm.weight' is missing",
    ),
    "extra tensor": (
        _retensor(lambda t: t.update(bias=torch.zeros(1))),
        "model.safetensors: tensor 'bias' is not part of this model",
    ),
    "shape": (
        _retensor(lambda t: t.update({"norm.weight": torch.ones(5)})),
        r"tensor 'norm.weight' is torch.float32 of shape \(5,\), the config asks for floating-point \(32,\)",
    ),
    "integers": (
        _retensor(lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int64)})),
        "tensor 'norm.weight' is torch.int64",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(transformer: Decoder, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    save_checkpoint(transformer, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a")


def test_config_can_be_read_alone(transformer: Decoder, tmp_path: Path) -> None:
    save_checkpoint(transformer, tmp_path / "a")
    assert read_config(tmp_path / "a") == ("transformer", transformer.config)


def test_an_unknown_class_cannot_be_saved(tmp_path: Path) -> None:
    class Stranger(Decoder):
        config_class = TransformerConfig

    with pytest.raises(ValueError, match="model: Stranger is none of the architectures"):
        save_checkpoint(Stranger(TransformerConfig(vocab_size=5, d_model=8, n_heads=2)), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as partial:
        (partial / "file").write_text(text)


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a", "old")
    (tmp_path / "deep" / "a" / "extra").write_text("gone with the old folder")
    write(tmp_path / "deep" / "a", "new")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "deep" / "a").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "a" / "file").read_text() == "new"


def test_an_error_while_writing_keeps_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


class Killed(BaseException):
    """A process that dies: nothing after it runs."""


@pytest.mark.parametrize("survived", range(6))
def test_a_kill_at_any_moment_leaves_a_complete_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Die before the n-th change of the file system; clean-up code does not run either."""
    write(tmp_path / "a", "old")
    left = [survived]

    def mortal(change: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", mortal(Path.rename))
        patch.setattr(Path, "mkdir", mortal(Path.mkdir))
        patch.setattr(_files.shutil, "rmtree", mortal(shutil.rmtree))
        try:
            write(tmp_path / "a", "new")
        except Killed:
            assert left[0] == 0
    assert (complete_folder(tmp_path / "a") / "file").read_text() in ("old", "new")
    write(tmp_path / "a", "third")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "third"


def test_a_checkpoint_between_two_renames_is_found(transformer: Decoder, tmp_path: Path) -> None:
    save_checkpoint(transformer, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".a.previous")
    assert torch.equal(load_checkpoint(tmp_path / "a")(TOKENS).logits, transformer(TOKENS).logits)
