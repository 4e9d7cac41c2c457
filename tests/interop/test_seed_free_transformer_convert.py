"""Files of the original are read: what they hold is kept, what differs is said, what is foreign is refused."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from helmholtz.data import DataConfig, TokenDataset
from helmholtz.interop.seeds.free_transformer import convert
from helmholtz.interop.seeds.free_transformer.config import ModelConfig
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.transformer import Transformer

VOCAB, WIDTH, HEADS, GROUPS, HIDDEN, BITS = 11, 16, 4, 2, 24, 3
HEAD = WIDTH // HEADS


def sizes(**changes) -> ModelConfig:
    values = dict(
        vocab_size=VOCAB, hidden_dim=WIDTH, num_layers=4, num_heads=HEADS, ffn_hidden_dim=HIDDEN,
        max_seq_len=32, latent_dim=BITS, split_layer=1,
    )  # fmt: skip
    return ModelConfig(**values | changes)


def block(prefix: str, groups: int) -> dict[str, Tensor]:
    shapes = {
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
        "wq.weight": (WIDTH, WIDTH),
        "wk.weight": (groups * HEAD, WIDTH),
        "wv.weight": (groups * HEAD, WIDTH),
        "wo.weight": (WIDTH, WIDTH),
        "ffn.w1.weight": (HIDDEN, WIDTH),
        "ffn.w2.weight": (WIDTH, HIDDEN),
        "ffn.w3.weight": (HIDDEN, WIDTH),
    }
    tensors = {prefix + name: torch.randn(shape) / 4 for name, shape in shapes.items()}
    return tensors | {
        f"{prefix}rope.{name}": torch.zeros(3) for name in ("inv_freq", "cos_cached", "sin_cached")
    }


def outer() -> dict[str, Tensor]:
    embedding = torch.randn(VOCAB, WIDTH)
    return {
        "token_embedding.weight": embedding,
        "norm.weight": torch.rand(WIDTH) + 0.5,
        "output.weight": embedding,
    }


def baseline_state(groups: int = HEADS) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return outer() | {k: v for i in range(4) for k, v in block(f"blocks.{i}.", groups).items()}


def free_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = outer() | block("first_half_blocks.0.", HEADS) | block("encoder.transformer_block.", HEADS)
    for i in range(3):
        state |= block(f"second_half_blocks.{i}.", HEADS)
    return state | {
        "encoder.zeta": torch.randn(1, 1, WIDTH),
        "encoder.norm.weight": torch.rand(WIDTH) + 0.5,
        "encoder.readout.weight": torch.randn(BITS, WIDTH),
        "latent_plan.binary_mapper.powers": torch.tensor([1, 2, 4]),
        "latent_plan.post_sampler_fc.weight": torch.randn(WIDTH, 2**BITS),
    }


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor) -> Tensor:
    """Pairs (i, i + K/2) of ``B T H K`` as complex numbers, turned."""
    half = HEAD // 2
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def by_hand(state: dict[str, Tensor], tokens: Tensor, groups: int) -> Tensor:
    """What the original's baseline computes, from its weights."""
    x = state["token_embedding.weight"][tokens]
    for i in range(4):
        w = {name[len(f"blocks.{i}.") :]: t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        h = norm(x, w["attn_norm.weight"])
        q, k, v = (
            (h @ w[f"{n}.weight"].T).unflatten(-1, (count, HEAD))
            for n, count in (("wq", HEADS), ("wk", groups), ("wv", groups))
        )
        k, v = (t.repeat_interleave(HEADS // groups, dim=2) for t in (turn(k), v))
        scores = torch.einsum("bthk,bshk->bhts", turn(q), k) / math.sqrt(HEAD)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        read = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(2)
        x = x + read @ w["wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        x = x + (F.silu(h @ w["ffn.w1.weight"].T) * (h @ w["ffn.w3.weight"].T)) @ w["ffn.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_a_converted_baseline_has_the_logits_of_the_original(groups, tied):
    state = baseline_state(groups)
    if not tied:
        state["output.weight"] = torch.randn(VOCAB, WIDTH)
    model = convert.convert_checkpoint(state, sizes(num_kv_heads=groups))
    assert isinstance(model, Transformer) and model.config.tie_embeddings == tied
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, by_hand(state, tokens, groups), rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_free_transformer_has_its_place():
    state = free_state()
    with pytest.warns(UserWarning, match="encoder has rotary positions"):
        model = convert.convert_checkpoint(state, sizes())
    assert isinstance(model, FreeTransformer) and model.config.split_layer == 1
    weights = model.state_dict()
    assert torch.equal(weights["encoder.query"], state["encoder.zeta"].flatten())
    assert torch.equal(weights["post_sampler.weight"], state["latent_plan.post_sampler_fc.weight"].T)
    for ours, theirs in (
        ("blocks.0", "first_half_blocks.0"),
        ("blocks.1", "second_half_blocks.0"),
        ("blocks.3", "second_half_blocks.2"),
        ("encoder.block", "encoder.transformer_block"),
    ):
        assert torch.equal(weights[f"{ours}.mixer.in_proj.weight"][:WIDTH], state[f"{theirs}.wq.weight"])
        assert torch.equal(weights[f"{ours}.mlp.down_proj.weight"], state[f"{theirs}.ffn.w2.weight"])
    assert model(torch.randint(VOCAB, (1, 9))).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("norm.weight"), sizes(), "norm.weight is missing"),
        (lambda s: s.pop("blocks.2.wk.weight"), sizes(), "blocks.2"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), sizes(), "head.bias is no part of this model"),
        (lambda s: None, sizes(num_layers=5), "blocks.4.* is missing"),
        (
            lambda s: None,
            sizes(num_kv_heads=2),
            r"in_proj.weight must be of shape \(32, 16\), got \(48, 16\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, config, message):
    state = baseline_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        convert.convert_checkpoint(state, config)


YAML = {
    "model": dict(vocab_size=VOCAB, hidden_dim=WIDTH, num_layers=4, num_heads=HEADS, ffn_hidden_dim=HIDDEN,
                  max_seq_len=32, latent_dim=BITS, split_layer=1),
    "training": dict(learning_rate=1e-3, warmup_steps=10, max_steps=100, batch_size=8, kappa_free_bits=0.3466,
                     gradient_accumulation_steps=2, wandb_project="plans", fsdp_config={"a": 1}),
    "data": dict(dataset_name="synthetic", data_dir="data/synthetic", max_length=24, num_workers=4),
}  # fmt: skip


def test_a_config_is_translated_and_every_difference_named():
    made, notes = convert.convert_config(YAML, architecture="free_transformer", output_dir="out")
    assert made["model"]["architecture"] == "free_transformer" and "vocab_size" not in made["model"]
    assert (made["model"]["n_latent_bits"], made["model"]["d_ff"], made["model"]["split_layer"]) == (3, 24, 1)
    train = made["train"]
    assert (train["steps"], train["accumulation"], train["seq_len"], train["lr"]) == (100, 2, 24, 1e-3)
    assert made["objective"]["kappa_bits"] == pytest.approx(0.5, abs=1e-3)
    assert made["data"] == {"folder": "data/synthetic", "tokenizer": "ids"}
    named = {note.split(":")[0] for note in notes}
    unused = {"training.wandb_project", "training.fsdp_config", "data.dataset_name", "data.num_workers"}
    changed = {"training.gradient_accumulation_steps", "training.max_steps", "model.vocab_size"}
    assert named == unused | changed
    assert "parallel" not in made
    sharded = YAML | {"training": YAML["training"] | {"use_fsdp": True}}
    made, notes = convert.convert_config(sharded, architecture="free_transformer", output_dir="out")
    assert made["parallel"] == {"strategy": "fsdp"}
    assert "training.use_fsdp: start it by torchrun; batch_size counts all processes" in notes
    made, notes = convert.convert_config(YAML, architecture="transformer", output_dir="out")
    assert "objective" not in made and "n_latent_bits" not in made["model"]
    assert "training.kappa_free_bits: not used without a plan" in notes


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "max_step", 3, "training has no key 'max_step'; did you mean 'max_steps'"),
        ("model", "hidden", 3, "model has no key 'hidden'; did you mean"),
        ("data", "data_folder", "x", "data has no key 'data_folder'"),
        ("training", "beta_kl", 0.5, "training.beta_kl must be 1"),
        ("model", "use_rope", False, "use_rope must be True"),
    ],
)
def test_a_config_with_what_is_unknown_or_unmet_is_refused(section, key, value, message):
    with pytest.raises(ValueError, match=message):
        changed = YAML | {section: YAML[section] | {key: value}}
        convert.convert_config(changed, architecture="free_transformer", output_dir="out")


def test_data_keep_their_ids(tmp_path):
    old, rows = tmp_path / "old", torch.randint(9, (6, 5))
    old.mkdir()
    torch.save(rows, old / "train.pt")
    torch.save(rows[:2], old / "val.pt")
    (old / "train_metadata.json").write_text('{"vocab_size": 10}')
    convert.convert_data(old, tmp_path / "new")
    data = TokenDataset(tmp_path / "new", "train")
    assert data.metadata.settings == DataConfig(tokenizer="ids").settings()
    assert data.vocab_size == 11 and len(data) == 36
    assert torch.equal(data.read(torch.tensor([0]), 36).view(6, 6)[:, :5], rows)
    (old / "train_metadata.json").unlink()
    assert convert.convert_data(old, tmp_path / "other").vocab_size == int(rows.max()) + 2
    torch.save(rows.float(), old / "val.pt")
    with pytest.raises(ValueError, match="val.pt must be a tensor of ids"):
        convert.convert_data(old, tmp_path / "third")


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_no_code_of_a_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Runs()}, "bad.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("bad.pt", "junk.pt", "none.pt"):
        with pytest.raises(ValueError, match=f"{name}: not readable as tensors alone"):
            convert.read_pickled(name)
    assert not (tmp_path / "ran").exists()


def test_the_command_converts_a_whole_project(tmp_path, capsys):
    torch.save({"model_state_dict": baseline_state(), "step": 3}, tmp_path / "old.pt")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(YAML))
    config, folder = str(tmp_path / "old.yaml"), str(tmp_path / "new")
    assert convert.main(["config", config, str(tmp_path / "new.yaml"), "--baseline"]) == 0
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["model"]["architecture"] == "transformer"
    assert convert.main(["checkpoint", str(tmp_path / "old.pt"), folder, "--config", config]) == 0
    assert isinstance(load_checkpoint(folder), Transformer)
    assert "state of the optimizer is left behind" in capsys.readouterr().err
    torch.save([1], tmp_path / "old.pt")
    assert convert.main(["checkpoint", str(tmp_path / "old.pt"), folder, "--config", config]) == 2
    assert "a checkpoint with 'model_state_dict'" in capsys.readouterr().err
    assert convert.main(["data", str(tmp_path), folder]) == 2
