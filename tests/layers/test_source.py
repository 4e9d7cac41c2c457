"""A second stream: what writes is made of the source, what reads of the stream. And calls without tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fem_cases import WIDTH, make_mixer, tokens
from helmholtz.layers import AbstractMixer
from helmholtz.layers.attention import Attention
from helmholtz.layers.fem_config import PRIORS
from helmholtz.layers.fem_reading import inspect_read
from helmholtz.layers.mamba import MambaMixer

MIXERS: dict[str, Callable[[], AbstractMixer[Any]]] = {
    "attention": lambda: Attention(WIDTH, 3, n_kv_heads=1),
    "mamba": lambda: MambaMixer(WIDTH, d_inner=32, d_state=5, d_head=8),
    **{f"fem-{prior}": lambda prior=prior: make_mixer(prior) for prior in PRIORS},
}
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1, 1]])


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> AbstractMixer[Any]:
    torch.manual_seed(0)
    made = MIXERS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2 and not request.param.startswith("fem"):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return made


def streams() -> tuple[Tensor, Tensor]:
    return tokens(2, 9), tokens(2, 9, seed=5)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_stream_as_its_own_source_changes_nothing(mixer: AbstractMixer[Any]) -> None:
    x, _ = streams()
    for masks in ({}, {"attention_mask": MASK}):
        assert_close(mixer(x, source=x.clone(), **masks), mixer(x, **masks))
    packed, bounds = x.reshape(1, 18, -1), torch.tensor([0, 4, 9, 18])
    assert_close(mixer(packed, source=packed.clone(), cu_seqlens=bounds), mixer(packed, cu_seqlens=bounds))


def test_the_content_of_pads_does_not_matter_in_either_stream(mixer: AbstractMixer[Any]) -> None:
    x, source = streams()
    expected = mixer(x, source=source, attention_mask=MASK)
    x, source = (s.masked_fill(MASK.unsqueeze(-1) == 0, torch.nan) for s in (x, source))
    assert torch.equal(mixer(x, source=source, attention_mask=MASK), expected)


def test_a_token_reads_for_itself_and_its_source_writes_for_what_follows() -> None:
    """Without the conditioning ``dy_j / dx_t`` is exactly 0 unless ``j = t``; Mamba's convolution reaches back by 3."""
    cases = {**MIXERS, **{f"fem-{p}": lambda p=p: make_mixer(p, tdc_width=0) for p in PRIORS}}
    x, source = (s[:1].requires_grad_() for s in streams())
    for name, build in cases.items():
        y, first = build()(x, source=source), 1 if name == "mamba" else 4
        dx, ds = torch.autograd.grad(y[:, 4].sum(), (x, source))
        assert (dx[:, :first] == 0).all() and (dx[:, 5:] == 0).all() and (dx[:, 4] != 0).any()
        assert (ds[:, 5:] == 0).all() and (ds[:, 0] != 0).any() and (ds[:, 4] != 0).any()


def test_mamba_reads_by_the_stream_what_the_source_wrote() -> None:
    mixer, (x, source) = MambaMixer(WIDTH, d_inner=32, d_state=5, d_head=8), streams()
    y = mixer(x, source=source)
    widths = [32, 32 + 5, 5, 4]  # gate, inputs and B, C, step sizes
    own, others = (mixer.in_proj(s).split(widths, dim=-1) for s in (x, source))
    joint = torch.cat([own[0], others[1], own[2], others[3]], dim=-1)
    mixer.in_proj.register_forward_hook(lambda *_: joint)
    assert_close(mixer(x), y)


def test_the_conditioning_of_either_stream_is_causal() -> None:
    x, source = (s[:1].requires_grad_() for s in streams())
    for prior in PRIORS:
        dx, ds = torch.autograd.grad(make_mixer(prior)(x, source=source)[:, 4].sum(), (x, source))
        assert (dx[:, 5:] == 0).all() and (dx[:, 0] != 0).any()
        assert (ds[:, 5:] == 0).all() and (ds[:, 0] != 0).any()


def test_what_a_mixer_shows_of_itself_does_not_depend_on_pads() -> None:
    mixer, (x, _) = make_mixer("gla"), streams()
    layout = mixer._layout(x, MASK, None, None, None)
    expected, values = mixer.project(x, layout)
    features, same = mixer.project(x.masked_fill(MASK.unsqueeze(-1) == 0, torch.nan), layout)
    assert torch.equal(same, values) and all(torch.equal(features[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prior", PRIORS)
def test_what_reads_is_made_of_the_stream_and_what_writes_of_the_source(prior: str) -> None:
    mixer, (x, source) = make_mixer(prior), streams()
    layout = mixer._layout(x, None, None, None, None)
    features, values = mixer.project(x, layout, source)
    own, others = mixer.project(x, layout)[0], mixer.project(source, layout)[0]
    reads = {name for name in features if torch.equal(features[name], own[name])}
    writes = {name for name in features if torch.equal(features[name], others[name])}
    assert reads == {"q", "inner", "outer", "c"} & features.keys()
    assert writes == features.keys() - reads and "v" in writes
    assert torch.equal(values, mixer.project(source, layout)[1])
    found, plain = inspect_read(mixer, x, source=source), inspect_read(mixer, x)
    assert_close(inspect_read(mixer, x, source=x.clone()).prior, plain.prior)
    assert not torch.allclose(found.prior, plain.prior)


@torch.no_grad()
def test_a_stream_of_both_equals_the_whole(mixer: AbstractMixer[Any]) -> None:
    x, source = streams()
    for mask in (None, MASK):
        state, parts = mixer.init_state(2), []
        for here in (slice(0, 4), slice(4, 5), slice(5, 9)):
            part = None if mask is None else mask[:, here]
            y, state = mixer(x[:, here], source=source[:, here], attention_mask=part, state=state)
            parts.append(y)
        assert_close(torch.cat(parts, 1), mixer(x, source=source, attention_mask=mask))


@torch.no_grad()
def test_a_source_may_come_and_go_in_a_stream(mixer: AbstractMixer[Any]) -> None:
    x, source = streams()
    joined = torch.cat([x[:, :3], source[:, 3:6], x[:, 6:]], dim=1)
    first, state = mixer(x[:, :3], state=mixer.init_state(2))
    second, state = mixer(x[:, 3:6], source=source[:, 3:6], state=state)
    third, _ = mixer(x[:, 6:], state=state)
    assert_close(torch.cat([first, second, third], dim=1), mixer(x, source=joined))


@torch.no_grad()
def test_one_vector_may_read_for_all_tokens(mixer: AbstractMixer[Any]) -> None:
    x, source = streams()
    query = x[:1, :1]
    for mask in (None, MASK):
        expected = mixer(query.expand_as(source).clone(), source=source, attention_mask=mask)
        real = torch.ones_like(MASK) if mask is None else mask
        actual = mixer(query, source=source, attention_mask=mask)
        if not isinstance(mixer, Attention | MambaMixer):
            assert actual.shape == expected.shape
        assert_close(actual[real.bool()], expected[real.bool()])


def test_a_layout_is_given_alone_and_a_state_without_packing(mixer: AbstractMixer[Any]) -> None:
    x, _ = streams()
    layout = mixer._layout(x, MASK, None, None, None)
    torch.testing.assert_close(mixer(x, layout=layout), mixer(x, attention_mask=MASK), rtol=0, atol=0)
    with pytest.raises(ValueError, match="layout must be alone"):
        mixer(x, layout=layout, attention_mask=MASK)
    with pytest.raises(ValueError, match="cu_seqlens must be None with a state"):
        mixer(x[:1], cu_seqlens=torch.tensor([0, 9]), state=mixer.init_state(1))
    for wrong in (x[..., :7], x[:1], x[:, :4]):
        with pytest.raises(ValueError, match=r"source: wanted shape \(2, 9, 24\)"):
            mixer(x, source=wrong)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_no_tokens_give_no_results_and_leave_a_stream_as_it_was(
    mixer: AbstractMixer[Any], shape: tuple[int, int]
) -> None:
    empty = torch.zeros(*shape, WIDTH, requires_grad=True)
    for masks in ({}, {"attention_mask": torch.ones(shape) > 0}):
        y = mixer(empty, **masks)
        assert y.shape == empty.shape and y.dtype == empty.dtype
        y.sum().backward()
        assert mixer.step(empty, mixer.init_state(shape[0]), **masks)[0].shape == empty.shape
    x, _ = streams()
    first, state = mixer.step(x[:, :4], mixer.init_state(2))
    _, same = mixer.step(x[:, :0], state)
    assert_close(torch.cat([first, mixer.step(x[:, 4:], same)[0]], dim=1), mixer(x))
