"""The matrix of combinations: any mixers, a plan at any layer or none, an equilibrium or none.

A pairwise selection here, all of it with ``pytest -m learn``.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoder_cases import N_BITS, SIZES, codes_of, tokens_of
from helmholtz.evals.convergence_case import validation_case
from helmholtz.evals.equilibria import equilibrium_of
from helmholtz.evals.inspection import count_parameters, read_text
from helmholtz.interop.hf import HelmholtzForCausalLM
from helmholtz.layers.latent import Plan
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.ops.losses import cross_entropy
from hybrid_cases import ALL, PAIRS, hybrid, hybrid_config

MATRIX = [
    pytest.param(case, id=", ".join(case), marks=() if case in PAIRS else pytest.mark.learn) for case in ALL
]
TIME = 12


@pytest.fixture(params=MATRIX)
def case(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return request.param


def read(model: Decoder, tokens: Tensor, code: Tensor, **options: object) -> Tensor:
    """Logits under the plan of these codes, if the model has plans."""
    return model(tokens, z=None if model.plan is None else Plan(code), **options).logits


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f"relative error {error:.3g}"


@torch.no_grad()
def test_neither_later_tokens_nor_later_codes_matter(case: tuple[str, str, str]) -> None:
    model, border = hybrid(*case), TIME // 2
    tokens, code = tokens_of(2, TIME), codes_of(2, TIME)
    later, later_code = tokens.clone(), code.clone()
    later[:, border:], later_code[:, border:] = (
        tokens_of(2, TIME - border, seed=1),
        codes_of(2, TIME - border, seed=2),
    )
    if model.equilibrium is None:
        assert torch.equal(read(model, tokens, code)[:, :border], read(model, later, later_code)[:, :border])
    else:  # a solver drops the tokens that have converged, and the others stand elsewhere in its products
        model = model.double()
        near(read(model, later, later_code)[:, :border], read(model, tokens, code)[:, :border], 1e-9)
    assert not torch.equal(read(model, tokens, code)[:, border:], read(model, later, later_code)[:, border:])


@torch.no_grad()
def test_pads_and_packing_change_nothing(case: tuple[str, str, str]) -> None:
    model = hybrid(*case)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]]).bool()
    tokens, code = tokens_of(2, TIME), codes_of(2, TIME)
    rows = [(tokens[r : r + 1, real], code[r : r + 1, real]) for r, real in enumerate(mask)]
    alone = [read(model, *row)[0] for row in rows]
    padded = read(model, tokens, code, attention_mask=mask)
    packed = read(
        model, *(torch.cat(parts, 1) for parts in zip(*rows, strict=True)),
        cu_seqlens=torch.tensor([0, len(alone[0]), len(alone[0]) + len(alone[1])]),
    )  # fmt: skip
    near(padded[mask], torch.cat(alone))
    near(packed[0], torch.cat(alone))
    assert not padded[~mask].any()
    if model.plan is not None:
        bits = model.posterior(model.lower(tokens, attention_mask=mask))
        near(bits[mask], torch.cat([model.posterior(model.lower(row))[0] for row, _ in rows]))


@torch.no_grad()
def test_a_prompt_and_steps_are_the_whole(case: tuple[str, str, str]) -> None:
    model = hybrid(*case)
    tokens, code = tokens_of(2, TIME), codes_of(2, TIME)
    state, parts = model.init_state(2), []
    for start, stop in ((0, 7), (7, 8), (8, TIME)):
        z = None if model.plan is None else Plan(code[:, start:stop])
        output = model.step(tokens[:, start:stop], state, z=z)
        state = output.state
        parts.append(output.logits)
    near(torch.cat(parts, dim=1), read(model, tokens, code))


def test_every_parameter_has_a_gradient(case: tuple[str, str, str]) -> None:
    model, tokens = hybrid(*case).train(), tokens_of(2, 2 * TIME)
    z = None if model.plan is None else model.encode(tokens[:, :-1])
    cross_entropy(model(tokens[:, :-1], z=z).logits, tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("dynamics.start_proj.weight"):  # a loss of its own trains it
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_checkpoints_and_folders_of_transformers_are_the_model(
    case: tuple[str, str, str], tmp_path: Path
) -> None:
    model, tokens, code = hybrid(*case), tokens_of(2, TIME), codes_of(2, TIME)
    expected = read(model, tokens, code)
    save_checkpoint(model, tmp_path / "own")
    HelmholtzForCausalLM.of(model).save_pretrained(tmp_path / "theirs")
    own = load_checkpoint(tmp_path / "own")
    theirs = HelmholtzForCausalLM.from_pretrained(tmp_path / "theirs").model
    for loaded in (own, theirs):
        assert type(loaded) is Decoder and loaded.config == model.config
        assert torch.equal(read(loaded, tokens, code), expected)


def test_generation_with_padding_is_that_of_each_row(case: tuple[str, str, str]) -> None:
    model = hybrid(*case)
    prompts, settings = [[1, 2, 3, 4, 5], [7, 6]], SamplingSettings(max_new_tokens=4, seed=3)
    rows = generate(model, prompts, settings)
    alone = [
        generate(model, [prompt], SamplingSettings(max_new_tokens=4, seed=3 + row))[0]
        for row, prompt in enumerate(prompts)
    ]
    assert rows == alone and all(len(row) == 4 for row in rows)


def test_a_source_that_is_the_stream_changes_nothing(case: tuple[str, str, str]) -> None:
    model = hybrid(*case)
    x = torch.randn(2, TIME, SIZES["d_model"])
    for block in model.blocks:
        near(block(x, source=x.clone()), block(x))


@torch.no_grad()
def test_tools_that_look_inside_read_under_one_plan() -> None:
    """Mixers of which one has a source, an encoder that does not run, equilibria of a text with a plan."""
    model, tokens = hybrid("fem-gla", "middle", "equilibrium"), tokens_of(1, TIME)
    readings = read_text(model, tokens)
    assert list(readings) == [f"blocks.{i}.mixer" for i in range(3)]
    found = equilibrium_of(model, tokens)
    assert torch.equal(equilibrium_of(model, tokens).z, found.z)
    assert sum(count.parameters for count in count_parameters(model)) == sum(
        p.numel() for p in model.parameters()
    )
    assert validation_case(model, tokens_of(2, TIME), seed=0).found.all()


BAD = {
    "no layers": ({"layers": []}, "layers must be at least one"),
    "a number of layers": ({"layers": 3}, "layers must be a list, or a pattern: .*, got 3"),
    "a layer that looks ahead": (
        {"layers": [{"mixer": {"kind": "attention", "d_model": 32, "n_heads": 4, "causal": False}}]},
        r"layers\[0\]\.mixer\.causal must be true",
    ),
    "another width": (
        {"layers": [{"mixer": {"kind": "mamba", "d_model": 64}}]},
        r"layers\[0\]\.mixer\.d_model must be d_model = 32, got 64",
    ),
    "no kind": ({"layers": [{"mixer": {"d_model": 32}}]}, r"layers\[0\]\.mixer\.kind must be one of attention, fem"),
    "an unknown kind": (
        {"layers": [{"mixer": {"kind": "mamber", "d_model": 32}}]},
        r"layers\[0\]\.mixer\.kind must be one of .* did you mean 'mamba'",
    ),
    "an unknown key": (
        {"layers": [{"mixer": {"kind": "mamba", "d_model": 32, "d_sate": 4}}]},
        r"layers\[0\]\.mixer has no key 'd_sate'; did you mean 'd_state'",
    ),
    "no feed-forward": (
        {"layers": [{"mixer": {"kind": "mamba", "d_model": 32}, "d_ff": 0}]}, "d_ff must be an integer of at least 1",
    ),
    "a plan above the last layer": ({"plan": {"layer": 3}}, "plan.layer must be at most 2"),
    "an encoder of Mamba": (
        {"plan": {"layer": 1, "encoder": {"mixer": {"kind": "mamba", "d_model": 32}}}},
        "plan.encoder.mixer.kind must be",
    ),
    "a causal encoder": (
        {"plan": {"layer": 1, "encoder": {"mixer": {"kind": "attention", "d_model": 32, "n_heads": 4}}}},
        "plan.encoder.mixer.causal must be false",
    ),
    "an encoder that cannot look back": (
        {"plan": {"layer": 1, "encoder": {"mixer": {
            "kind": "fem", "d_model": 32, "n_heads": 4, "prior": "rnn_softmax", "causal": False}}}},
        "plan.encoder.mixer.prior must be one of",
    ),
    "an equilibrium of another width": (
        {"equilibrium": {"d_model": 16, "d_inner": 32, "d_head": 8}},
        "equilibrium.d_model must be d_model = 32, got 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_name(case: str) -> None:
    changes, message = BAD[case]
    values = json.loads(json.dumps(hybrid_config("mixed", "middle", "equilibrium").to_dict()))
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict(values | changes)


def test_a_part_that_is_missing_is_named() -> None:
    plain, tokens = hybrid("attention", "no plan", "plain"), tokens_of(1, 4)
    for call in (
        lambda: plain(tokens, z=Plan(codes_of(1, 4))),
        lambda: plain.lower(tokens),
        lambda: plain.encode(tokens),
        lambda: plain.sample_prior(1, 4),
    ):
        with pytest.raises(
            ValueError, match="plan: wanted a model with a latent plan, got a Decoder without one"
        ):
            call()
    for call in (
        lambda: plain(tokens, z_init=torch.zeros(1, 4, 32)),
        lambda: plain.solver,
        lambda: plain.memory,
    ):
        with pytest.raises(
            ValueError, match="equilibrium: wanted a model with .*, got a Decoder without one"
        ):
            call()
    planned = hybrid("attention", "middle", "plain")
    with pytest.raises(ValueError, match="state.plan must be True"):
        planned.step(tokens, plain.init_state(1))


def test_the_encoder_is_attention_with_the_heads_of_the_layer_unless_it_is_given() -> None:
    encoder = hybrid_config("fem-softmax", "middle", "plain").plan_config().encoder
    assert encoder.mixer.kind == "fem"
    encoder = hybrid_config("attention", "middle", "plain").plan_config().encoder
    assert (encoder.mixer.kind, encoder.mixer.n_heads, encoder.mixer.causal, encoder.d_ff) == (
        "attention",
        4,
        False,
        48,
    )


@torch.no_grad()
def test_a_hybrid_copies_and_its_start_leaves_its_equilibria() -> None:
    model = copy.deepcopy(hybrid("mixed", "middle", "equilibrium"))
    tokens, plan = tokens_of(2, TIME), Plan(codes_of(2, TIME, n_bits=N_BITS))
    found = model(tokens, z=plan)
    assert found.equilibrium.solution.converged.all()
    again = model(tokens, z=plan, z_init=found.equilibrium.z)
    torch.testing.assert_close(again.logits, found.logits, rtol=1e-3, atol=1e-3)


def test_layers_can_be_named_in_a_pattern_and_parts_take_the_models_width() -> None:
    config = DecoderConfig.from_dict(
        {"vocab_size": 9, "d_model": 64, "layers": "attention, fem:gla x3, fem, mamba x 2",
         "plan": {"layer": 0}, "equilibrium": {"d_head": 32, "n_patterns": 4}}
    )  # fmt: skip
    kinds = [getattr(layer.mixer, "prior", layer.mixer.kind) for layer in config.layers]
    assert kinds == ["attention", "gla", "gla", "gla", "softmax", "mamba", "mamba"]
    assert [layer.d_ff is None for layer in config.layers] == [False] * 5 + [True] * 2
    assert config.equilibrium.d_inner == 128 and config.plan.encoder.mixer.d_model == 64
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    counts = [sum(p.numel() for p in block.parameters()) for block in Decoder(config).blocks[:2]]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("atention", "layers must be one of .*'atention'; did you mean 'attention'"),
        ("fem:glu", "the prior of fem must be one of .*'glu'; did you mean 'gla'"),
        ("mamba:gla", "layers must be a prior after fem alone, got 'mamba:gla'"),
        ("mamba x0", "layers must be from 1 to 10000 times"),
        ("mamba x99999999", "layers must be parts such as"),
        ("", "layers must be parts such as"),
        ("mamba mamba", "layers must be parts such as"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({"vocab_size": 9, "layers": pattern})
