"""What every Free Energy Mixer must do, whichever prior it has."""

import pytest
import torch

from fem_cases import LINEAR_TIME_PRIORS, difference, make_mixer, tokens
from fem_oracle import mixer_output
from helmholtz.layers.fem_config import PRIORS
from helmholtz.layers.state import map_state

every_prior = pytest.mark.parametrize("prior", PRIORS)
EXACT = 1e-5
"""Allowed relative difference in float32 between two ways to compute the same output."""

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "interior": [[1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1, 0, 0]],
    "empty row": [[0] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]],
}
every_mask = pytest.mark.parametrize("pattern", MASKS)

VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "mirrored conditioning": {"causal": False, "tdc_bidirectional": True},
    "biases": {"bias": True},
    "no conditioning": {"tdc_width": 0},
    "raw conditioning": {"tdc_norm_first": False},
    "mean": {"read": "mean"},
    "free energy": {"read": "free_energy"},
    "no outer gate": {"outer_gate": False},
}


def gradients(out, inputs):
    """Of a fixed random projection of ``out``."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad((out.double() * cotangent).sum(), inputs)


def assert_equals_oracle(mixer, x, *, tolerance=EXACT, **call):
    """The output in the dtype given; in float64 also the gradients of the input and of every parameter."""
    masks = {"attention_mask": call.get("mask"), "cu_seqlens": call.get("cu_seqlens")}
    assert difference(mixer(x, **masks), mixer_output(mixer, x, **call)) < tolerance
    mixer, x = mixer.double(), x.double().requires_grad_()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    actual, expected = mixer(x, **masks), mixer_output(mixer, x, **call)
    assert difference(actual, expected) < tolerance
    both = gradients(actual, leaves.values()), gradients(expected, leaves.values())
    for name, got, want in zip(leaves, *both, strict=True):
        assert difference(got, want) < tolerance, name


@every_prior
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_the_equations(prior, variant):
    rope = {} if prior == "mamba" else {"rope_theta": 0.0}
    mixer = make_mixer(prior, **rope, **VARIANTS[variant]).double()
    assert_equals_oracle(mixer, tokens(2, 9, dtype=torch.float64), tolerance=1e-10)


@every_prior
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@every_mask
def test_masked_rows_are_their_real_tokens(prior, causal, pattern):
    mask = torch.tensor(MASKS[pattern])
    mixer = make_mixer(prior, causal=causal, bias=True)
    assert_equals_oracle(mixer, tokens(2, 9), mask=mask)


@every_prior
@pytest.mark.parametrize(
    "options", [{}, {"causal": False, "tdc_bidirectional": True}], ids=["causal", "both ways"]
)
def test_packed_rows_are_their_sequences(prior, options):
    mixer = make_mixer(prior, **options)
    assert_equals_oracle(mixer, tokens(1, 11), cu_seqlens=torch.tensor([0, 1, 6, 7, 11]))


@every_prior
@every_mask
@pytest.mark.parametrize("content", [1e30, float("inf"), float("nan")])
def test_pads_influence_nothing_whatever_they_hold(prior, pattern, content):
    mask = torch.tensor(MASKS[pattern])
    mixer, x = make_mixer(prior), tokens(2, 9)
    poisoned = x.masked_fill(mask.unsqueeze(-1) == 0, content).requires_grad_()
    y = mixer(poisoned, attention_mask=mask)
    assert torch.equal(y, mixer(x, attention_mask=mask))
    assert (y[mask == 0] == 0).all()
    (grad,) = torch.autograd.grad(y.square().sum(), poisoned)
    assert grad.isfinite().all() and (grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).any()


@every_prior
def test_a_mask_may_be_bool_or_integer_and_all_ones_is_no_mask(prior):
    mask = torch.tensor(MASKS["interior"])
    mixer, x = make_mixer(prior), tokens(2, 9)
    assert torch.equal(mixer(x, attention_mask=mask.bool()), mixer(x, attention_mask=mask.int() * 7))
    assert difference(mixer(x, attention_mask=torch.ones(2, 9, dtype=torch.bool)), mixer(x)) < EXACT


@every_prior
@pytest.mark.parametrize("size", [1e3, -1e3, 1e12])
@pytest.mark.parametrize("read", ["temperature", "free_energy", "mean"])
def test_the_future_changes_no_bit_of_the_past(prior, size, read):
    mixer, x = make_mixer(prior, read=read), tokens(2, 40)
    shaken = x.clone()
    shaken[:, 20:] += size * tokens(2, 20, seed=9)
    assert torch.equal(mixer(x)[:, :20], mixer(shaken)[:, :20])
    assert not torch.equal(mixer(x)[:, 20:], mixer(shaken)[:, 20:])


@every_prior
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_no_gradient_flows_to_the_past_from_the_future(prior, padded):
    mixer, x = make_mixer(prior), tokens(2, 40).requires_grad_()
    mask = torch.rand(2, 40) > 0.3 if padded else None
    (grad,) = torch.autograd.grad(mixer(x, attention_mask=mask)[:, :20].square().sum(), x)
    assert (grad[:, 20:] == 0).all() and (grad[:, :20] != 0).any()


@every_prior
def test_packed_sequences_do_not_see_each_other(prior):
    mixer, x, bounds = make_mixer(prior), tokens(1, 20), torch.tensor([0, 7, 13, 20])
    shaken = x.clone()
    shaken[:, 7:13] += 1e3
    before, after = mixer(x, cu_seqlens=bounds), mixer(shaken, cu_seqlens=bounds)
    assert torch.equal(before[:, :7], after[:, :7]) and difference(after[:, 13:], before[:, 13:]) < EXACT
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x, cu_seqlens=bounds)[:, 7:13].square().sum(), x)
    assert (grad[:, :7] == 0).all() and (grad[:, 13:] == 0).all()


@every_prior
def test_a_row_does_not_depend_on_its_neighbours(prior):
    mixer, x = make_mixer(prior), tokens(3, 20)
    assert difference(mixer(x)[1:2], mixer(x[1:2])) < EXACT
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[1].square().sum(), x)
    assert (grad[0] == 0).all() and (grad[2] == 0).all()


@every_prior
def test_without_causality_the_future_is_seen(prior):
    mixer, x = make_mixer(prior, causal=False), tokens(2, 9).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[:, 0].square().sum(), x)
    assert (grad.abs().amax(-1) > 0).all()


@every_prior
def test_reading_backwards_mirrors_the_output(prior):
    """Without positions, a mixer that sees both ways treats them alike."""
    mixer = make_mixer(prior, causal=False, rope_theta=0.0, tdc_width=0).double()
    x = tokens(2, 9, dtype=torch.float64)
    assert difference(mixer(x.flip(1)), mixer(x).flip(1)) < 1e-12


def run_in_steps(mixer, x, bounds, mask=None):
    state, parts = mixer.init_state(x.shape[0]), []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = None if mask is None else mask[:, start:stop]
        y, state = mixer.step(x[:, start:stop], state, attention_mask=part)
        parts.append(y)
    return torch.cat(parts, dim=1), state


@every_prior
def test_every_split_into_steps_equals_the_whole(prior):
    mixer, x = make_mixer(prior, bias=True), tokens(2, 6)
    with torch.no_grad():
        whole = mixer(x)
        for cuts in range(2**5):
            bounds = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
            y, state = run_in_steps(mixer, x, bounds)
            assert difference(y, whole) < EXACT, bounds
    assert state.position.tolist() == [6, 6]


@every_prior
@every_mask
def test_steps_with_masks_equal_the_whole(prior, pattern):
    mixer, x, mask = make_mixer(prior), tokens(2, 9), torch.tensor(MASKS[pattern])
    with torch.no_grad():
        for bounds in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 4, 9], [0, 2, 7, 8, 9]):
            y, state = run_in_steps(mixer, x, bounds, mask)
            assert difference(y, mixer(x, attention_mask=mask)) < EXACT, bounds
    assert state.position.tolist() == mask.sum(1).tolist()


@every_prior
def test_a_long_prompt_and_many_tokens_at_once(prior):
    mixer, x = make_mixer(prior), tokens(2, 300)
    with torch.no_grad():
        y, _ = run_in_steps(mixer, x, [0, 200, 201, 266, 300])
        assert difference(y, mixer(x)) < EXACT


@every_prior
def test_gradients_flow_through_the_state(prior):
    mixer = make_mixer(prior).double()
    x = tokens(2, 12, dtype=torch.float64).requires_grad_()
    leaves = [x, *mixer.parameters()]
    parts = gradients(run_in_steps(mixer, x, [0, 5, 6, 12])[0], leaves)
    for got, want in zip(parts, gradients(mixer(x), leaves), strict=True):
        assert difference(got, want) < 1e-9


@every_prior
def test_a_step_leaves_the_state_it_was_given(prior):
    mixer, x = make_mixer(prior), tokens(2, 8)
    with torch.no_grad():
        _, state = run_in_steps(mixer, x, [0, 5])
        copy = map_state(torch.clone, state)
        first, _ = mixer.step(x[:, 5:], state)
        again, _ = mixer.step(x[:, 5:], copy)
        swapped, _ = mixer.step(x[:, 5:].flip(0), map_state(lambda part: part.flip(0), state))
    assert torch.equal(first, again)
    assert difference(swapped.flip(0), first) < EXACT


def state_size(state):
    sizes = []
    map_state(lambda part: sizes.append(part.numel()) or part, state)
    return sum(sizes)


@every_prior
def test_the_state_has_constant_size_for_all_but_softmax(prior):
    mixer = make_mixer(prior)
    with torch.no_grad():
        sizes = [state_size(run_in_steps(mixer, tokens(1, time), [0, time])[1]) for time in (3, 30)]
    assert (sizes[0] == sizes[1]) == (prior in LINEAR_TIME_PRIORS), sizes


def test_a_grouped_query_mixer_is_one_with_repeated_heads():
    grouped = make_mixer("softmax", n_heads=4, n_kv_heads=2)
    full = make_mixer("softmax", n_heads=4)
    rows = {"q": 6, "k": 6, "v": 4, "inner": 4, "outer": 4}
    with torch.no_grad():
        for target, source in [
            (full.in_proj.weight, grouped.in_proj.weight),
            (full.tdc.out_proj.weight, grouped.tdc.out_proj.weight),
        ]:
            widths = {**grouped.query_widths, **grouped.key_widths}
            parts = dict(zip(widths, source.split(list(widths.values())), strict=True))
            for name in ("k", "v"):
                heads = parts[name].unflatten(0, (2, rows[name]))
                parts[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
            target.copy_(torch.cat([parts[name] for name in {**full.query_widths, **full.key_widths}]))
        full.theta.copy_(grouped.theta.repeat_interleave(2, dim=0))
        full.o_proj.weight.copy_(grouped.o_proj.weight)
        shared = {k: v for k, v in grouped.tdc.state_dict().items() if "out_proj" not in k}
        full.tdc.load_state_dict(shared, strict=False)
    x, mask = tokens(2, 9), torch.tensor(MASKS["interior"])
    assert difference(grouped(x), full(x)) < EXACT
    assert difference(grouped(x, attention_mask=mask), full(x, attention_mask=mask)) < EXACT
    assert_equals_oracle(grouped, x, mask=mask)
