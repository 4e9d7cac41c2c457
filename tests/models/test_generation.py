"""Sampling: exact against the full pass, row by row, and the laws of its filters."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor

from helmholtz import kernels
from helmholtz.layers.latent import Plan
from helmholtz.layers.state import KVCache, Room
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import generate, generate_planned
from helmholtz.models.outputs import LMState
from helmholtz.models.sampling import SamplingSettings, draw, next_tokens, sampling_probabilities

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
SETTINGS = SamplingSettings(max_new_tokens=10, temperature=0.8, top_k=12, top_p=0.9, seed=11)


def sampled_from_full_passes(model: Decoder, prompt: list[int], settings: SamplingSettings) -> list[int]:
    """One prompt, no state: the whole sequence is read again for every token, under the plan that is reported."""
    generator = torch.Generator().manual_seed(settings.seed)
    sequence, given = list(prompt), {}
    for _ in range(settings.max_new_tokens):
        if model.plan is not None:
            codes = generate_planned(model, [prompt], settings)[0].codes
            given = {"z": Plan(torch.tensor([codes[: len(sequence)]]))}
        logits = model(torch.tensor([sequence]), **given).logits[:, -1]
        uniform = torch.rand(1, 1, generator=generator, dtype=torch.float64)
        token = int(draw(sampling_probabilities(logits, settings), uniform))
        if token in settings.stop_tokens:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


@torch.no_grad()
def test_a_padded_batch_equals_full_passes_row_by_row(model: Decoder) -> None:
    found = generate(model, PROMPTS, SETTINGS)
    for row, prompt in enumerate(PROMPTS):
        settings = replace(SETTINGS, seed=SETTINGS.seed + row)
        assert found[row] == sampled_from_full_passes(model, prompt, settings)


def test_a_row_sampled_alone_equals_it_in_a_batch(model: Decoder) -> None:
    found = generate(model, PROMPTS, SETTINGS)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], replace(SETTINGS, seed=SETTINGS.seed + row)) == [found[row]]


def test_prompts_longer_than_a_chunk_are_read_in_parts(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, PROMPTS, SETTINGS)
    monkeypatch.setattr("helmholtz.models.generation.PREFILL_CHUNK", 2)
    assert generate(model, PROMPTS, SETTINGS) == expected


def memory(node: Any) -> set[int]:
    """Where the tensors lie that grow with a stream."""
    if isinstance(node, tuple):
        return set().union(*map(memory, node))
    if not is_dataclass(node):
        return set()
    parts = [getattr(node, f.name) for f in fields(node)]
    if any(isinstance(part, Room) for part in parts):
        grown = [part for part in parts if isinstance(part, Tensor) and part.ndim > 1]
        return {part.data_ptr() for part in grown}
    return set().union(*map(memory, parts))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "one row"])
def test_what_grows_is_allocated_once_and_the_encoder_needs_none_of_it(
    model: Decoder, prompts: list[list[int]]
) -> None:
    states: list[LMState] = []
    model.register_forward_hook(lambda module, args, output: states.append(output.state))
    generate(model, prompts, SETTINGS)
    assert len({frozenset(memory(state)) for state in states}) == 1
    caches = sum(isinstance(getattr(block, "prior", block), KVCache) for block in states[0].blocks)
    per_cache = 2 if len(prompts) == 1 else 3  # keys, values and with pads a mask
    assert len(memory(states[-1])) == caches * per_cache + (model.plan is not None)
    assert model.plan is None or states[-1].plan.hidden is None


def test_sampling_is_reproducible_and_leaves_no_trace(transformer: Decoder) -> None:
    transformer.train()
    transformer.blocks[0].eval()
    modes = [module.training for module in transformer.modules()]
    random_state = torch.get_rng_state()
    first, second = (generate(transformer, PROMPTS, SETTINGS) for _ in range(2))
    assert first == second
    assert first != generate(transformer, PROMPTS, replace(SETTINGS, seed=12))
    assert modes == [module.training for module in transformer.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(transformer: Decoder) -> None:
    transformer.train()

    def fail(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(transformer, PROMPTS, SETTINGS, callback=fail)
    assert transformer.training and transformer.blocks[1].mlp.training


def test_a_stop_token_ends_its_row_and_is_left_out(transformer: Decoder) -> None:
    free = generate(transformer, PROMPTS, SETTINGS)
    stop = free[0][4]
    stopped = generate(transformer, PROMPTS, replace(SETTINGS, stop_tokens=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)


def test_generation_ends_when_every_row_has(transformer: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(transformer, PROMPTS, SETTINGS)
    steps, step = [], transformer.step
    monkeypatch.setattr(transformer, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    first_tokens = tuple({tokens[0] for tokens in free})
    assert generate(transformer, PROMPTS, replace(SETTINGS, stop_tokens=first_tokens)) == [[], [], []]
    assert len(steps) == 1


def test_the_callback_sees_every_token_in_order(transformer: Decoder) -> None:
    seen: list[list[int]] = [[] for _ in PROMPTS]
    settings = replace(SETTINGS, stop_tokens=(generate(transformer, PROMPTS, SETTINGS)[1][3],))
    found = generate(transformer, PROMPTS, settings, callback=lambda row, token: seen[row].append(token))
    assert seen == found


def test_the_whole_length_can_be_used(transformer: Decoder) -> None:
    longest = transformer.config.max_seq_len
    found = generate(transformer, [[1] * 60, [2]], SamplingSettings(max_new_tokens=longest - 60))
    assert [len(tokens) for tokens in found] == [4, 4]
    with pytest.raises(
        ValueError, match=r"prompts\[0\]: 60 tokens and max_new_tokens=5 exceed max_seq_len=64"
    ):
        generate(transformer, [[1] * 60, [2]], SamplingSettings(max_new_tokens=5))


def test_bad_prompts_are_refused(transformer: Decoder) -> None:
    for prompts, message in [
        ([], "prompts: wanted at least one"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1], [2, 37]], r"prompts\[1\]: id 37 is not in the vocabulary of 37 ids"),
        ([[-1]], r"prompts\[0\]: id -1 is not in the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(transformer, prompts, SETTINGS)


@torch.no_grad()
def test_nan_logits_are_an_error(transformer: Decoder) -> None:
    transformer.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="model: its logits are NaN"):
        generate(transformer, PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("stop_tokens", (-1,)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        SamplingSettings(**{field: value})


LOGITS = strategies.lists(strategies.floats(-8, 8, width=32), min_size=2, max_size=12)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values])


@given(values=LOGITS, k=strategies.integers(1, 14), temperature=strategies.floats(0.05, 4))
def test_top_k_keeps_the_k_likeliest_in_proportion(values: list[float], k: int, temperature: float) -> None:
    full = sampling_probabilities(row(values), SamplingSettings(temperature=temperature))[0]
    kept = sampling_probabilities(row(values), SamplingSettings(temperature=temperature, top_k=k))[0]
    torch.testing.assert_close(full, (row(values).double() / temperature).softmax(-1)[0])
    assert (kept > 0).sum() == min(k, len(values))
    assert (
        full[kept > 0].min() >= full[kept == 0].max() if k < len(values) else torch.equal(kept > 0, full > 0)
    )
    torch.testing.assert_close(kept, full.where(kept > 0, 0) / full[kept > 0].sum())


@given(values=LOGITS, p=strategies.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(values: list[float], p: float) -> None:
    full = sampling_probabilities(row(values), SamplingSettings())[0]
    kept = sampling_probabilities(row(values), SamplingSettings(top_p=p))[0]
    mass, smallest = full[kept > 0].sum(), full[kept > 0].min()
    assert mass >= p - 1e-12
    assert mass - smallest < p + 1e-12
    assert (full[kept == 0] <= smallest).all()
    torch.testing.assert_close(kept, full.where(kept > 0, 0) / mass)


def test_top_p_counts_what_top_k_has_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    settings = SamplingSettings(top_k=2, top_p=0.55)  # 0.4 / 0.7 = 0.571 reaches it, 0.4 would not
    assert sampling_probabilities(logits, settings).tolist() == [[1.0, 0.0, 0.0, 0.0]]


@given(values=LOGITS)
def test_temperature_zero_and_its_limit_take_the_likeliest(values: list[float]) -> None:
    greedy = sampling_probabilities(row(values), SamplingSettings(temperature=0))[0]
    assert greedy.sum() == 1 and greedy.argmax() == row(values).argmax()
    cold = sampling_probabilities(row(values), SamplingSettings(temperature=1e-300))[0]
    assert cold.isfinite().all() and cold[row(values)[0] < max(values)].sum() == 0


@given(values=LOGITS, uniform=strategies.floats(0, 1, exclude_max=True), k=strategies.integers(1, 12))
def test_draw_inverts_the_cumulative_distribution(values: list[float], uniform: float, k: int) -> None:
    probabilities = sampling_probabilities(row(values), SamplingSettings(top_k=k))
    token = int(draw(probabilities, torch.tensor([[uniform]], dtype=torch.float64)))
    assert probabilities[0, token] > 0
    below, up_to = probabilities[0, :token].sum(), probabilities[0, : token + 1].sum()
    assert below - 1e-12 <= uniform <= up_to + 1e-12


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    uniform = torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(probabilities.expand(20000, 4).contiguous(), uniform).bincount(minlength=4) / 20000
    assert counts[1] == 0
    assert (counts - probabilities[0]).abs().max() < 0.015  # four standard deviations


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 99},
    {"top_p": 0.3},
    {"top_p": 1.0},
    {"top_k": 9, "top_p": 0.5},
]


@pytest.mark.skipif(not kernels.LOADED, reason="the kernels are not built")
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1e-300])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_kernel_draws_the_tokens_of_the_plain_form(filters: dict, temperature: float) -> None:
    logits = torch.randn(200, 37).mul(3).round()  # so that many are equal
    logits[3, 5], logits[4] = torch.nan, 0.0
    logits[5, :36] = -torch.inf
    uniform = torch.rand(200, 1, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-53
    settings = SamplingSettings(temperature=temperature, **filters)
    found = next_tokens(logits, settings, uniform)
    with kernels.plain_forms():
        wanted = next_tokens(logits, settings, uniform)
    assert torch.equal(found, wanted)
    assert found[3] == -1 and found[5] == 36 and (found == -1).sum() == 1
