"""A config that asks for more than the weights hold: one line, at once, before memory is asked for."""

import json
import resource
from pathlib import Path

import pytest
import torch

from decoder_cases import liven
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from hf_cases import CORES, ONE_OF_EACH

SIZES = {
    "n_layers": 10**6,
    "d_model": 10**6,
    "vocab_size": 10**9,
    "max_seq_len": 10**30,
    "norm_eps": 10**30,
}


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_size_that_the_weights_do_not_have_is_refused_at_once(
    name: str, field: str, tmp_path: Path
) -> None:
    model = liven(CORES[name]())
    save_checkpoint(model, tmp_path)
    file = tmp_path / "config.json"
    description = json.loads(file.read_text())
    description["config"][field] = SIZES[field]
    file.write_text(json.dumps(description))
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*({field}|the config asks for|integer of 31 digits)"):
        load_checkpoint(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KiB


@pytest.mark.parametrize("prior", ["softmax", ["softmax"] * 2])
def test_a_billion_layers_are_not_written_out(prior: object, tmp_path: Path) -> None:
    save_checkpoint(CORES["fem-softmax"](), tmp_path)
    file = tmp_path / "config.json"
    description = json.loads(file.read_text())
    description["config"] |= {"n_layers": 10**9, "prior": prior}
    file.write_text(json.dumps(description))
    for read in (read_config, load_checkpoint):
        with pytest.raises(
            ValueError, match=r"config.json: n_layers must be at most \d+, the tensors of model"
        ):
            read(tmp_path)


def test_brackets_within_brackets_are_refused(tmp_path: Path) -> None:
    save_checkpoint(CORES["transformer"](), tmp_path)
    (tmp_path / "config.json").write_text('{"config":' * 100_000)
    with pytest.raises(ValueError, match=r"config.json: not valid JSON \(too deeply nested\)"):
        load_checkpoint(tmp_path)


def test_weights_can_be_read_by_others(tmp_path: Path) -> None:
    save_checkpoint(CORES["transformer"](), tmp_path / "a")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_checkpoint_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``best`` is: the reader has the config of one model and finds the weights of the next."""
    from helmholtz.models import checkpoint

    old, new = CORES["transformer"](), CORES["mamba"]()
    save_checkpoint(old, tmp_path / "best")
    read, left = checkpoint._read_weights, [new]

    def replaced(file: Path) -> dict[str, torch.Tensor]:
        if left:
            save_checkpoint(left.pop(), tmp_path / "best")
        return read(file)

    monkeypatch.setattr(checkpoint, "_read_weights", replaced)
    assert type(load_checkpoint(tmp_path / "best")) is type(new)


def test_a_file_that_shrinks_between_its_header_and_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch maps the file by its name, after safetensors has read the header of the one that was there before."""
    from helmholtz.models import checkpoint

    save_checkpoint(CORES["transformer"](), tmp_path / "best")
    load, left = checkpoint.load_file, [CORES["mamba"]()]

    def replaced(file: Path) -> dict[str, torch.Tensor]:
        if left:
            save_checkpoint(left.pop(), tmp_path / "best")
            raise RuntimeError(
                "file <model.safetensors> size <64960> is smaller than the required mapping size"
            )
        return load(file)

    monkeypatch.setattr(checkpoint, "load_file", replaced)
    assert type(load_checkpoint(tmp_path / "best")) is MODELS["mamba"]
