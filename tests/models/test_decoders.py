"""What holds for every decoder: padding, packing, streaming, causality, gradients, narrow dtypes, bad input."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from helmholtz.layers.state import map_state
from helmholtz.models.decoder import Decoder
from helmholtz.ops.losses import cross_entropy

VOCABULARY, TOLERANCE = 37, 1e-5


def tokens_of(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < TOLERANCE, f"relative error {error:.3g}"


def trained(model: Decoder) -> dict[str, Tensor]:
    """Parameters that logits depend on: not on where an iteration starts, which a loss of its own trains."""
    return {
        name: p for name, p in model.named_parameters() if not name.endswith("dynamics.start_proj.weight")
    }


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "interior": [[1, 0, 1, 1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1, 0]],
}


@pytest.mark.parametrize("pattern", MASKS)
def test_padded_rows_equal_rows_without_pads(model: Decoder, pattern: str) -> None:
    mask, tokens = torch.tensor(MASKS[pattern]), tokens_of(2, 9)
    logits = model(tokens, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        assert_close(logits[row, real], model(tokens[row : row + 1, real]).logits[0])
        assert (logits[row, ~real] == 0).all()


@pytest.mark.parametrize("pattern", MASKS)
def test_what_is_at_pads_does_not_matter(model: Decoder, pattern: str) -> None:
    mask, tokens = torch.tensor(MASKS[pattern]).bool(), tokens_of(2, 9)
    others = tokens.masked_fill(~mask, -100)  # not even an id
    assert torch.equal(
        model(tokens, attention_mask=mask).logits, model(others, attention_mask=mask.long()).logits
    )


def test_a_row_of_pads_is_zero_and_has_no_gradient_trouble(model: Decoder) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    logits = model(tokens_of(2, 4), attention_mask=mask).logits
    assert (logits[1] == 0).all()
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_packed_sequences_equal_separate_ones(model: Decoder) -> None:
    tokens, bounds = tokens_of(1, 21), [0, 1, 8, 21]
    packed = model(tokens, cu_seqlens=torch.tensor(bounds)).logits
    for start, stop in zip(bounds, bounds[1:], strict=False):
        assert_close(packed[:, start:stop], model(tokens[:, start:stop]).logits)


@settings(max_examples=15)
@given(
    cuts=strategies.lists(strategies.integers(1, 19), max_size=4, unique=True), padded=strategies.booleans()
)
def _split_anywhere(model: Decoder, cuts: list[int], padded: bool) -> None:
    tokens = tokens_of(2, 20)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) > 0.3 if padded else None
    state, parts, bounds = model.init_state(2), [], [0, *sorted(cuts), 20]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = None if mask is None else mask[:, start:stop]
        output = model.step(tokens[:, start:stop], state, attention_mask=part)
        state = output.state
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), model(tokens, attention_mask=mask).logits)
    assert state.position.tolist() == ([20, 20] if mask is None else mask.sum(1).tolist())


@torch.no_grad()
def test_a_stream_cut_anywhere_equals_the_full_pass(model: Decoder) -> None:
    """In float64: in float32 these weights make 1e-5 of the rounding of a single sum."""
    _split_anywhere(copy.deepcopy(model).double())


@torch.no_grad()
def test_token_by_token_after_a_padded_prompt_equals_the_full_pass(model: Decoder) -> None:
    tokens = tokens_of(2, 16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, :5] = False
    expected = model(tokens, attention_mask=mask).logits
    output = model.step(tokens[:, :8], model.init_state(2), attention_mask=mask[:, :8])
    for t in range(8, 16):
        output = model.step(tokens[:, t : t + 1], output.state)
        assert_close(output.logits[:, 0], expected[:, t])


def test_a_step_leaves_its_state_unchanged(model: Decoder) -> None:
    state = model.step(tokens_of(2, 5), model.init_state(2)).state
    kept = copy.deepcopy(map_state(Tensor.detach, state))
    first = model.step(tokens_of(2, 3, seed=1), state)
    again = model.step(tokens_of(2, 3, seed=1), kept)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(state.position, kept.position)


@pytest.mark.parametrize("length", [None, 10])
@torch.no_grad()
def test_branches_of_one_state_do_not_meet(model: Decoder, length: int | None) -> None:
    """A beam search's use: states are continued in any order, each as if it were the only one."""
    model = copy.deepcopy(model).double()
    texts = [torch.cat([tokens_of(2, 4), tokens_of(2, 4, seed=seed)], dim=1) for seed in (1, 2, 3)]
    root = model.step(texts[0][:, :4], model.init_state(2, length=length)).state
    states, logits = [root] * 3, [[], [], []]
    for t in range(4, 8):
        for branch in (2, 0, 1):
            output = model.step(texts[branch][:, t : t + 1], states[branch])
            states[branch] = output.state
            logits[branch].append(output.logits)
    for text, found in zip(texts, logits, strict=True):
        assert_close(torch.cat(found, dim=1), model(text).logits[:, 4:])


def test_rows_of_a_state_can_be_reordered(model: Decoder) -> None:
    state, tokens = model.step(tokens_of(3, 5), model.init_state(3)).state, tokens_of(3, 2, seed=1)
    rows = torch.tensor([2, 0])
    picked = model.step(tokens[rows], map_state(lambda x: x[rows], state)).logits
    assert_close(picked, model.step(tokens, state).logits[rows])


def unchanged(model: Decoder, one: Tensor, other: Tensor, places: tuple) -> None:
    """Logits of two texts at ``places``: equal, as the same places in the same products.

    But in float64's rounding where a solver drops the tokens that have converged, and the others stand elsewhere.
    """
    if model.equilibrium is None:
        assert torch.equal(model(one).logits[places], model(other).logits[places])
        return
    model = copy.deepcopy(model).double()
    torch.testing.assert_close(model(one).logits[places], model(other).logits[places], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("border", [1, 8, 16])
def test_the_future_changes_nothing_at_all(model: Decoder, border: int) -> None:
    tokens, other = tokens_of(2, 17), tokens_of(2, 17, seed=1)
    changed = torch.cat([tokens[:, :border], other[:, border:]], dim=1)
    unchanged(model, tokens, changed, (slice(None), slice(border)))
    assert not torch.equal(model(tokens).logits[:, border:], model(changed).logits[:, border:])


def test_neighbours_in_the_batch_change_nothing(model: Decoder) -> None:
    tokens, other = tokens_of(3, 12), tokens_of(3, 12, seed=1)
    other[1] = tokens[1]
    unchanged(model, tokens, other, (1,))
    assert_close(model(tokens).logits[1:2], model(tokens[1:2]).logits)


def test_every_parameter_has_a_gradient(model: Decoder) -> None:
    tokens = tokens_of(2, 33)
    cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]).backward()
    for name, parameter in trained(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_stay_finite_and_near(model: Decoder, dtype: torch.dtype) -> None:
    tokens = tokens_of(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    wide = model(tokens, attention_mask=mask).logits
    narrow = copy.deepcopy(model).to(dtype)
    logits = narrow(tokens, attention_mask=mask).logits
    assert logits.dtype == dtype
    error = (logits.float() - wide).square().mean().sqrt() / wide.square().mean().sqrt()
    assert error < 16 * torch.finfo(dtype).eps
    cross_entropy(logits[:, 7:-1], tokens[:, 8:]).backward()
    assert all(p.grad.isfinite().all() for p in trained(narrow).values())


def test_autocast_streams_as_it_reads(model: Decoder) -> None:
    tokens = tokens_of(2, 10)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(tokens).logits
        output = model.step(tokens[:, :6], model.init_state(2))
        rest = model.step(tokens[:, 6:], output.state).logits
    error = (torch.cat([output.logits, rest], dim=1) - expected).float().abs().max() / expected.abs().max()
    assert error < 16 * torch.finfo(torch.bfloat16).eps


def test_two_constructions_from_one_seed_are_equal(model: Decoder) -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(5)
        built.append(type(model)(model.config).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in built), strict=True))


BAD_TOKENS = {
    "float": (torch.zeros(1, 3), "tokens: wanted int32 or int64 ids, got torch.float32"),
    "rank": (
        torch.zeros(3, dtype=torch.long),
        r"tokens: wanted shape \(B, T\), got \(3,\)",
    ),
    "too large": (torch.tensor([[0, 37]]), "tokens: id 37 is not in the vocabulary of 37 ids"),
    "negative": (torch.tensor([[-1, 36]]), "tokens: id -1 is not in the vocabulary of 37 ids"),
    "too long": (
        torch.zeros(1, 65, dtype=torch.long),
        "a sequence of 65 tokens is longer than max_seq_len=64",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_refused(transformer: Decoder, case: str) -> None:
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message):
        transformer(tokens)
    with pytest.raises(ValueError, match=message):
        transformer.step(tokens, transformer.init_state(max(1, len(tokens))))


BAD_MASKS = {
    "shape": ({"attention_mask": torch.ones(2, 4)[:, :3].bool()}, r"attention_mask: .*\(2, 4\).*\(2, 3\)"),
    "dtype": ({"attention_mask": torch.ones(2, 4)}, "attention_mask: .*torch.float32"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: .*batch of 2"),
    "both": (
        {"cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(2, 4).bool()},
        "cu_seqlens and attention_mask exclude each other",
    ),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks_are_refused(transformer: Decoder, case: str) -> None:
    arguments, message = BAD_MASKS[case]
    with pytest.raises(ValueError, match=message):
        transformer(tokens_of(2, 4), **arguments)


def test_the_length_limit_counts_the_stream_and_only_real_tokens(transformer: Decoder) -> None:
    state = transformer.step(tokens_of(1, 60), transformer.init_state(1)).state
    with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than max_seq_len=64"):
        transformer.step(tokens_of(1, 5), state)
    pads = torch.tensor([[0, 1, 1, 1, 1]])
    assert transformer.step(tokens_of(1, 5), state, attention_mask=pads).state.position.tolist() == [64]
    transformer(tokens_of(1, 100), cu_seqlens=torch.tensor([0, 50, 100]))
    with pytest.raises(ValueError, match="a sequence of 65 tokens"):
        transformer(tokens_of(1, 100), cu_seqlens=torch.tensor([0, 35, 100]))


def test_a_state_of_another_batch_is_refused(transformer: Decoder) -> None:
    with pytest.raises(ValueError, match="tokens: 3 rows came, the state is of a batch of 2"):
        transformer.step(tokens_of(3, 2), transformer.init_state(2))


def test_a_state_of_a_deeper_model_is_refused(transformer: Decoder) -> None:
    deeper = type(transformer)(replace(transformer.config, n_layers=transformer.config.n_layers + 1))
    for model, other in ((transformer, deeper), (deeper, transformer)):
        with pytest.raises(
            ValueError, match=rf"state.blocks must be {len(model.blocks)}, one per block, got"
        ):
            model.step(tokens_of(2, 2), other.init_state(2))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_tokens_give_no_logits_and_leave_a_stream_as_it_was(
    model: Decoder, shape: tuple[int, int]
) -> None:
    empty, tokens = torch.zeros(shape, dtype=torch.long), tokens_of(2, 5)
    model(empty).logits.sum().backward()
    assert model(empty, attention_mask=empty).logits.shape == (*shape, 37)
    assert model.step(empty, model.init_state(shape[0])).logits.shape == (*shape, 37)
    with torch.no_grad():
        state = model.step(tokens, model.init_state(2)).state
        same = model.step(empty, state).state if shape[0] else state
        assert_close(model.step(tokens, same).logits, model.step(tokens, state).logits)
