"""The parts of a latent plan, each on its own."""

import pytest
import torch
from torch import Tensor

from helmholtz import ops, reference
from helmholtz.layers.attention import Attention
from helmholtz.layers.block import Block
from helmholtz.layers.latent import (
    BitsPostSampler,
    LatentEncoder,
    Plan,
    TablePostSampler,
    sample_plan,
)
from helmholtz.layers.mlp import SwiGLU
from helmholtz.layers.sequence import sequence_layout
from helpers import assert_matches

WIDTH, BITS = 16, 4


def lively(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def source_block(*, causal: bool = True, dropout: float = 0.0) -> Block:
    attention = Attention(WIDTH, 4, n_kv_heads=2, causal=causal)
    return lively(Block(attention, SwiGLU(WIDTH, 24), WIDTH, dropout=dropout))  # type: ignore[return-value]


def encoder() -> LatentEncoder:
    return lively(LatentEncoder(source_block(causal=False), WIDTH, BITS, norm_eps=1e-6))  # type: ignore[return-value]


def code_and_logits(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 7, BITS, dtype=torch.float64, requires_grad=requires_grad)
    return torch.randint(2**BITS, (2, 7)), logits


# --- plans


def test_given_codes_replace_those_and_cut_the_gradient_there_alone() -> None:
    code, logits = code_and_logits()
    given = torch.randint(2**BITS, (2, 7))
    where = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()
    plan = Plan(code, logits)
    mixed, again = plan.given(given, where), plan.given(given, where)
    assert torch.equal(mixed.code, given.where(where, code)) and torch.equal(plan.code, code)
    assert mixed.logits is not None and torch.equal(mixed.logits, logits)
    table = lively(TablePostSampler(BITS, 3)).double()
    for sampler, planned in ((table, mixed), (lively(BitsPostSampler(BITS, 3)).double(), again)):
        (grad,) = torch.autograd.grad(sampler(planned).square().sum(), logits)
        assert not grad[where].any() and (grad[~where] != 0).any(-1).all()
    mixed, plain = plan.given(given, where), Plan(mixed.code, logits)
    kept = [torch.autograd.grad(table(z).square().sum(), logits)[0][~where] for z in (mixed, plain)]
    torch.testing.assert_close(*kept)


def test_given_codes_for_a_plan_without_logits() -> None:
    code, _ = code_and_logits()
    mixed = Plan(code).given(torch.zeros_like(code), torch.ones_like(code).bool())
    assert mixed.logits is None and not mixed.code.any()


def test_given_codes_must_be_of_the_plans_shape() -> None:
    code, _ = code_and_logits()
    short = code[:, :6]
    with pytest.raises(ValueError, match=r"code must be of shape \(2, 7\), got \(2, 6\)"):
        Plan(code).given(short, torch.ones_like(short).bool())


def test_a_sampled_plan_holds_the_bits_drawn_and_the_logits_themselves() -> None:
    logits = torch.randn(3, 50, 16, requires_grad=True)
    plan = sample_plan(logits, generator=torch.Generator().manual_seed(5))
    bits = ops.sample_bits(logits, generator=torch.Generator().manual_seed(5))
    assert plan.logits is logits and torch.equal(plan.code, reference.bits_to_code(bits))


# --- post-samplers


def test_the_table_gives_the_row_of_each_code() -> None:
    table = TablePostSampler(BITS, 3)
    code, logits = code_and_logits()
    for plan in (Plan(code), Plan(code, logits.float())):
        assert torch.equal(table(plan), table.weight[code])
    assert TablePostSampler(10, 64).weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.03)


def test_the_tables_gradient_is_that_of_all_codes() -> None:
    table = lively(TablePostSampler(BITS, 3)).double()
    code, logits = code_and_logits()
    cotangent = torch.randn(2, 7, 3, dtype=torch.float64)
    leaves = (logits, table.weight)
    actual = torch.autograd.grad(table(Plan(code, logits)), leaves, cotangent)
    expected = torch.autograd.grad(reference.code_lookup(table.weight, code, logits), leaves, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)


def test_bits_add_up_with_their_signs() -> None:
    sampler = lively(BitsPostSampler(BITS, 3)).double()
    code, logits = code_and_logits()
    signs = 2 * reference.code_to_bits(code, BITS).double() - 1
    expected = torch.einsum("bth,dh->btd", signs, sampler.proj.weight)
    for plan in (Plan(code), Plan(code, logits)):
        torch.testing.assert_close(sampler(plan), expected)
    cotangent = torch.randn(2, 7, 3, dtype=torch.float64)
    to_logits, to_weight = torch.autograd.grad(
        sampler(Plan(code, logits)), (logits, sampler.proj.weight), cotangent
    )
    p = logits.sigmoid()
    torch.testing.assert_close(to_logits, 2 * p * (1 - p) * (cotangent @ sampler.proj.weight))
    torch.testing.assert_close(to_weight, torch.einsum("btd,bth->dh", cotangent, signs))


@pytest.mark.parametrize("build", [TablePostSampler, BitsPostSampler])
def test_on_the_meta_device_nothing_is_drawn(build: type) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        sampler = build(16, 64)
    assert torch.equal(state, torch.get_rng_state()) and next(sampler.parameters()).is_meta


# --- the block with a source


@pytest.mark.parametrize("causal", [True, False])
def test_with_itself_as_source_it_is_the_plain_block(causal: bool) -> None:
    block = source_block(causal=causal)
    plain = Block(block.mixer, block.mlp, WIDTH)
    plain.mixer_norm, plain.mlp_norm = block.mixer_norm, block.mlp_norm
    for time in (1, 9, 70):
        x = torch.randn(2, time, WIDTH)
        torch.testing.assert_close(block(x, source=x), plain(x))  # another product: q alone, then k and v
        torch.testing.assert_close(block(x), plain(x))


def test_queries_and_residual_come_from_x_keys_and_values_from_the_source() -> None:
    block, x, source = source_block(), torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)
    x.requires_grad_(), source.requires_grad_()
    parts = block.mixer_norm(x), block.mixer_norm(source)
    q, k, v = (
        y @ w.T
        for y, w in zip(
            (parts[0], parts[1], parts[1]), block.mixer.in_proj.weight.split([16, 8, 8]), strict=True
        )
    )
    layout = sequence_layout(x)
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
    q, k = (ops.rope(y, layout.positions) for y in (q, k))
    h = x + ops.softmax_attention(q, k, v).transpose(1, 2).flatten(2) @ block.mixer.o_proj.weight.T
    expected = h + block.mlp(block.mlp_norm(h))
    actual = block(x, source=source)
    assert_matches("y", actual, expected, budget=20)
    cotangent = torch.randn(2, 9, WIDTH)
    for a, e in zip(
        torch.autograd.grad(actual, (x, source), cotangent),
        torch.autograd.grad(expected, (x, source), cotangent),
        strict=True,
    ):
        assert_matches("gradient", a, e, budget=40)


def test_a_replaced_projection_is_honoured_with_a_source() -> None:
    """As an adapter does: the module around the weight counts, not the weight alone."""
    block, x = source_block(), torch.randn(1, 5, WIDTH)
    block.mixer.in_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(block(x, source=x), block(x))


@torch.no_grad()
def test_a_stream_with_a_source_equals_the_whole() -> None:
    block, x, source = source_block(), torch.randn(2, 12, WIDTH), torch.randn(2, 12, WIDTH)
    mask = torch.rand(2, 12) > 0.3
    for real in (None, mask):
        state, parts = block.init_state(2), []
        for here in (slice(0, 5), slice(5, 6), slice(6, 12)):
            layout = sequence_layout(
                x[:, here], None if real is None else real[:, here], position=state.position
            )
            y, state = block(x[:, here], layout=layout, state=state, source=source[:, here])
            parts.append(y)
        whole = block(x, source=source, attention_mask=real)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_on_what_the_block_writes() -> None:
    block, x, source = source_block(dropout=0.5), torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)
    quiet = source_block()
    quiet.load_state_dict(block.state_dict())
    assert not torch.equal(block(x, source=source), block(x, source=source))
    assert torch.equal(block.eval()(x, source=source), quiet(x, source=source))


# --- the encoder


def test_the_encoder_is_a_query_through_a_block_a_norm_and_a_readout() -> None:
    reads, x = encoder(), torch.randn(2, 9, WIDTH)
    start = reads.query.expand(2, 9, WIDTH)
    y = reads.block(start, source=x)
    y = reads.norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(reads(x, sequence_layout(x)), y @ reads.readout.weight.T)
    assert reads.readout.bias is None


@torch.no_grad()
def test_every_bit_of_every_token_depends_on_every_token() -> None:
    reads, x = encoder(), torch.randn(1, 8, WIDTH)
    before = reads(x, sequence_layout(x))
    for t in range(8):
        changed = x.clone()
        changed[:, t] += torch.randn(WIDTH)
        assert (reads(changed, sequence_layout(x)) != before).all()


@torch.no_grad()
def test_the_encoders_pads_are_zero_and_unread() -> None:
    reads, x = encoder(), torch.randn(2, 8, WIDTH)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    logits = reads(x, sequence_layout(x, mask))
    assert not logits[~mask].any() and logits[0, mask[0]].all()
    hidden = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert torch.equal(reads(hidden, sequence_layout(x, mask)), logits)
    real = x[:1, mask[0]]
    torch.testing.assert_close(logits[:1, mask[0]], reads(real, sequence_layout(real)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_positions_all_tokens_would_be_one() -> None:
    """Why the encoder has rotary positions: attention that no angle turns reads the same for every token."""
    reads, x = encoder(), torch.randn(1, 12, WIDTH)
    layout = sequence_layout(x)
    assert reads(x, layout).std(1).min() > 1e-3
    attention = Attention(
        WIDTH, 4, n_kv_heads=2, causal=False, rope_theta=1e30
    )  # all but the first pair stand still
    attention.load_state_dict(reads.block.mixer.state_dict())
    attention.in_proj.weight.unflatten(0, (-1, 4))[:, [0, 2]] = 0  # and that pair is cut
    reads.block.mixer = attention
    assert reads(x, layout).std(1).max() < 1e-5
