"""What must hold of the Free Transformer whatever its weights: the properties by which it was specified.

Codes, lookup, KL and free bits (``tests/ops/test_binary_latent.py``)::

     1  codes are exact integers, whatever the logits' dtype    bits_and_codes_are_inverse; here: 01
     2  bits are drawn independently with their marginals       bits_are_drawn_independently...; here: 02 (both modes)
     3  the logits' gradient is exact over all codes            lookup_and_its_gradients_equal_enumeration (1..10 bits),
                                                                gradient_is_the_difference_of_conditional_expectations,
                                                                a_table_linear_in_the_bits... (11, 16 bits)
     4  the table's gradient: the rows drawn, and only those    lookup_and_its_gradients_equal_enumeration; here: 04
     5  equal to the dense one-hot path; memory                 lookup_in_every_dtype (8, 12 bits), no_tensor_has...,
                                                                sixteen_bits_at_8_x_1024_tokens_stay_under_500_mb
     6  KL: zero, limits, enumeration, gradient                 kl_and_its_gradient_equal_enumeration,
                                                                kl_is_zero_only..., kl_of_certain_bits...
     7  free bits: both ends, hinge before the mean, pads       free_bits_at_both_ends, the_hinge_comes_before_the_mean,
                                                                pads_count_nothing, free_bits_is_the_reference
     8  loss = cross-entropy + hinge, raw KL beside it          tests/training/test_free_bits.py

The model::

     9  a table of zeros leaves the plain decoder               09
    10  the plan reaches keys and values of one block only      10
    11  causal under a given plan, though the encoder is not    11
    12  the encoder tells positions apart, by distance only     12
    13  pads, neighbours, packed documents                      13; tests/models/test_decoders.py
    14  a stream equals the full pass; codes of the past stay   14; tests/models/test_free_transformer_streams.py
    15  prompts: posterior, prior, seed, given codes            tests/models/test_planning.py
    16  continuations: uniform codes, limits, greedy, stops     tests/models/test_planning.py
    17  speed                                                   measured, not tested: docs/benchmarks.md
    18  what the parameters are                                 tests/models/test_free_transformer.py,
                                                                tests/evals/test_inspection.py
    19  gradients, bfloat16, checkpoints, compilation           19; tests/models/test_decoders.py, test_checkpoint.py,
                                                                tests/layers/test_compile.py
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings, strategies
from torch import Tensor

from decoder_cases import N_BITS, SIZES, codes_of, liven, make_free, tokens_of
from helmholtz import ops
from helmholtz.layers import sequence
from helmholtz.layers.latent import BitsPostSampler, Plan, TablePostSampler, sample_plan
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helpers import DTYPES

EVERY_BLOCK = [(2, 1), (3, 1), (3, 2), (5, 2), (5, 4), (4, 3)]
"""Numbers of blocks, odd and even, and places of the plan among them, first and last included."""
ROUNDED = {"rtol": 1e-10, "atol": 1e-10}
"""In float64, of sums that are the same in another order."""


def logits_of(model: FreeTransformer, tokens: Tensor, code: Tensor, **masks: Tensor) -> Tensor:
    return model(tokens, z=Plan(code), **masks).logits


def bit_logits(model: FreeTransformer, tokens: Tensor, **masks: Tensor) -> Tensor:
    return model.posterior(model.lower(tokens, **masks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_bits", [1, 8, 11, 16])
def test_01_plans_are_exact_in_narrow_dtypes_and_under_autocast(n_bits: int, dtype: torch.dtype) -> None:
    logits = torch.full((2, 50, n_bits), 30.0, dtype=dtype)
    signs = torch.randint(2, logits.shape).bool()
    certain = torch.where(signs, logits, -logits)
    expected = (signs.long() * 2 ** torch.arange(n_bits)).sum(-1)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert (sample_plan(logits, generator=torch.Generator()).code == 2**n_bits - 1).all()
            plan = sample_plan(certain, generator=torch.Generator())
            assert plan.code.dtype == torch.long and torch.equal(plan.code, expected)
            table = TablePostSampler(n_bits, 3)
            assert torch.equal(table(plan), table.weight[expected])


def test_02_the_posterior_is_sampled_in_training_and_in_evaluation() -> None:
    model = make_free(n_layers=2)
    half = model.lower(tokens_of(1, 12))
    p = model.posterior(half)[0].sigmoid().double()
    for mode in (True, False):
        model.train(mode)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            codes = torch.cat([model.sample_posterior(half, generator=generator).code for _ in range(400)])
        found = ops.code_to_bits(codes, N_BITS).double().mean(0)
        assert ((found - p).abs() < 4.5 * (p * (1 - p) / 400).sqrt() + 1e-9).all()
        assert ((p > 0.1) & (p < 0.9)).any(), "thresholded bits would pass"


@pytest.mark.parametrize("n_bits", [3, 12])
def test_04_rows_of_the_table_that_were_not_drawn_have_no_gradient(n_bits: int) -> None:
    table = TablePostSampler(n_bits, 4)
    code = codes_of(2, 6, n_bits=n_bits)
    cotangent = torch.randn(2, 6, 4)
    for logits in (None, torch.randn(2, 6, n_bits, requires_grad=True)):
        (grad,) = torch.autograd.grad(table(Plan(code, logits)), table.weight, cotangent)
        expected = torch.zeros_like(grad).index_add_(0, code.flatten(), cotangent.flatten(0, 1))
        torch.testing.assert_close(grad, expected)
        drawn = code.unique()
        assert (grad[drawn] != 0).all() and grad.count_nonzero() == 4 * len(drawn)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 1, "tie_embeddings": False},
        {"post_sampler": "bits"},
        {"d_model": 128, "n_layers": 5, "n_kv_heads": 2, "split_layer": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("time", [1, 13, 200])
@torch.no_grad()
def test_09_a_table_of_zeros_leaves_the_plain_decoder(fields: dict, time: int) -> None:
    """But for rounding: queries alone, then keys and values of the source, are other products than the decoder's."""
    model = make_free(**{"max_seq_len": 256} | fields).double()
    for parameter in model.post_sampler.parameters():
        parameter.zero_()
    names = {"post_sampler", "n_latent_bits", "split_layer"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in names}
    plain = Transformer(TransformerConfig(**config)).eval().double()
    weights, own = model.state_dict(), plain.state_dict()
    assert {n.split(".")[0] for n in weights.keys() - own.keys()} == {"encoder", "post_sampler"}
    plain.load_state_dict({name: weights[name] for name in own})
    tokens, code = tokens_of(3, time), codes_of(3, time)
    torch.testing.assert_close(logits_of(model, tokens, code), plain(tokens).logits, **ROUNDED)
    mask = torch.arange(time) >= torch.tensor([[0], [time // 2], [time - 1]])
    padded = logits_of(model, tokens, code, attention_mask=mask)
    torch.testing.assert_close(padded, plain(tokens, attention_mask=mask).logits, **ROUNDED)
    if time > 1:
        bounds = {"cu_seqlens": torch.tensor([0, time // 3, time])}
        packed = logits_of(model, tokens[:1], code[:1], **bounds)
        torch.testing.assert_close(packed, plain(tokens[:1], **bounds).logits, **ROUNDED)


class Inputs:
    """What enters a module: its argument and, if any, its source."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor | None]] = []
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append((args[0], kwargs.get("source")))


@pytest.mark.parametrize(("n_layers", "split"), EVERY_BLOCK)
@torch.no_grad()
def test_10_the_plan_enters_as_the_source_of_one_block(n_layers: int, split: int) -> None:
    model = make_free(n_layers=n_layers, split_layer=split)
    blocks = [Inputs(block) for block in model.blocks]
    mixers = [Inputs(block.mixer) for block in model.blocks]
    tokens = tokens_of(2, 9)
    for seed in (1, 2):
        logits_of(model, tokens, codes_of(2, 9, seed))
    for layer, inputs in enumerate(zip(blocks, mixers, strict=True)):
        for (x, source), (other_x, other_source) in (seen.calls for seen in inputs):
            assert torch.equal(x, other_x) == (layer <= split), "queries and residual stream"
            if layer == split:
                assert (source != other_source).any(-1).any(-1).all(), "keys and values"
            else:
                assert source is None and other_source is None
    x, source = blocks[split].calls[0]
    torch.testing.assert_close(source - x, model.post_sampler(Plan(codes_of(2, 9, 1))))


@torch.no_grad()
def test_10_without_what_the_middle_block_reads_the_plan_changes_nothing() -> None:
    model = make_free()
    model.blocks[1].mixer.o_proj.weight.zero_()
    tokens = tokens_of(2, 9)
    assert torch.equal(
        logits_of(model, tokens, codes_of(2, 9, 1)), logits_of(model, tokens, codes_of(2, 9, 2))
    )


@given(
    where=strategies.integers(0, 10), bit=strategies.integers(0, N_BITS - 1), seed=strategies.integers(0, 99)
)
def test_10_a_code_matters_from_its_own_position_on(where: int, bit: int, seed: int) -> None:
    model, tokens, code = MODEL, tokens_of(1, 11, seed), codes_of(1, 11, seed)
    changed = code.clone()
    changed[0, where] ^= 1 << bit
    leaf = torch.zeros(1, 11, N_BITS, requires_grad=True)
    before = model(tokens, z=Plan(code, leaf)).logits
    after = logits_of(model, tokens, changed)
    assert torch.equal(before[:, :where], after[:, :where])
    assert (before[:, where:] != after[:, where:]).any(-1).all()
    (grad,) = torch.autograd.grad(before[:, where].square().sum(), leaf)
    assert not grad[:, where + 1 :].any() and grad[:, : where + 1].all()


@pytest.mark.parametrize("border", [1, 6, 10])
def test_11_under_a_given_plan_the_future_changes_no_bit_but_of_the_encoder(border: int) -> None:
    model, tokens, code = MODEL, tokens_of(2, 11), codes_of(2, 11)
    others = torch.cat([tokens[:, :border], (tokens[:, border:] + 1) % 37], 1)
    before, after = (logits_of(model, x, code) for x in (tokens, others))
    assert torch.equal(before[:, :border], after[:, :border])
    assert (before[:, border:] != after[:, border:]).any(-1).all()
    before, after = (bit_logits(model, x) for x in (tokens, others))
    assert (before[:, :border] - after[:, :border]).abs().amax(-1).min() > 1e-3


def test_11_the_loss_of_a_token_reaches_no_later_one_but_through_its_code() -> None:
    model, tokens = MODEL, tokens_of(1, 11)
    half = model.lower(tokens)
    (through_plan,) = torch.autograd.grad(
        model.upper(half, Plan(codes_of(1, 11), model.posterior(half))).logits[:, 4].square().sum(),
        half.x,
        retain_graph=True,
    )
    (given_plan,) = torch.autograd.grad(
        model.upper(half, Plan(codes_of(1, 11))).logits[:, 4].square().sum(), half.x
    )
    assert (through_plan[:, 5:] != 0).any(-1).all()
    assert not given_plan[:, 5:].any() and (given_plan[:, :5] != 0).any(-1).all()


@pytest.mark.parametrize("sizes", [{}, {"n_kv_heads": 1}, {"n_latent_bits": 16, "n_layers": 2}], ids=str)
@torch.no_grad()
def test_12_the_encoder_tells_positions_apart(sizes: dict) -> None:
    fresh = FreeTransformer(FreeTransformerConfig(**SIZES | sizes))
    for model, spread in ((make_free(**sizes), 1e-2), (fresh, 1e-5)):
        assert bit_logits(model, tokens_of(2, 20)).std(1).min() > spread


@torch.no_grad()
def test_12_only_distances_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, code = make_free(n_kv_heads=2), tokens_of(2, 20), codes_of(2, 20)
    expected = bit_logits(model, tokens), logits_of(model, tokens, code)
    table, offsets = sequence.rope_table, []

    def later(positions: Tensor, *args: int, **options: float) -> tuple[Tensor, Tensor]:
        offsets.append(100)
        return table(positions + 100, *args, **options)

    monkeypatch.setattr(sequence, "rope_table", later)
    for found, wanted in zip(
        (bit_logits(model, tokens), logits_of(model, tokens, code)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert offsets


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "scattered": [[1, 0, 1, 1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1, 0]],
}


@pytest.mark.parametrize("pattern", MASKS)
@torch.no_grad()
def test_13_pads_change_neither_logits_nor_plan_nor_its_price(pattern: str) -> None:
    model, tokens, code, mask = MODEL, tokens_of(2, 9), codes_of(2, 9), torch.tensor(MASKS[pattern]).bool()
    bits, logits = (
        bit_logits(model, tokens, attention_mask=mask),
        logits_of(model, tokens, code, attention_mask=mask),
    )
    kl = ops.kl_per_token(bits)
    others = tokens.where(mask, 36 - tokens), code.where(mask, 2**N_BITS - 1 - code)
    assert torch.equal(bits, bit_logits(model, others[0], attention_mask=mask))
    assert torch.equal(logits, logits_of(model, *others, attention_mask=mask))
    for row, real in enumerate(mask):
        alone = tokens[row : row + 1, real], code[row : row + 1, real]
        assert not bits[row, ~real].any() and not kl[row, ~real].any()
        torch.testing.assert_close(bits[row, real], bit_logits(model, alone[0])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[row, real], logits_of(model, *alone)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            kl[row, real], ops.kl_per_token(bit_logits(model, alone[0]))[0], rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_13_neighbours_in_the_batch_change_nothing() -> None:
    tokens, code = tokens_of(3, 9), codes_of(3, 9)
    others, other_code = tokens_of(3, 9, seed=5), codes_of(3, 9, seed=5)
    others[1], other_code[1] = tokens[1], code[1]
    assert torch.equal(bit_logits(MODEL, tokens)[1], bit_logits(MODEL, others)[1])
    assert torch.equal(logits_of(MODEL, tokens, code)[1], logits_of(MODEL, others, other_code)[1])


@torch.no_grad()
def test_13_packed_documents_do_not_read_each_other() -> None:
    tokens, code, bounds = tokens_of(1, 15), codes_of(1, 15), [0, 4, 5, 15]
    packing = {"cu_seqlens": torch.tensor(bounds)}
    bits, logits = bit_logits(MODEL, tokens, **packing), logits_of(MODEL, tokens, code, **packing)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        here = slice(start, stop)
        torch.testing.assert_close(bits[:, here], bit_logits(MODEL, tokens[:, here]), rtol=1e-5, atol=1e-5)
        alone = logits_of(MODEL, tokens[:, here], code[:, here])
        torch.testing.assert_close(logits[:, here], alone, rtol=1e-5, atol=1e-5)
        changed = tokens.clone(), code.clone()
        changed[0][:, here], changed[1][:, here] = 36 - tokens[:, here], 2**N_BITS - 1 - code[:, here]
        elsewhere = torch.ones(15, dtype=torch.bool)
        elsewhere[here] = False
        assert torch.equal(bits[:, elsewhere], bit_logits(MODEL, changed[0], **packing)[:, elsewhere])
        assert torch.equal(logits[:, elsewhere], logits_of(MODEL, *changed, **packing)[:, elsewhere])


STREAMED = {name: make_free(**fields) for name, fields in {
    "every head its own": {}, "grouped": {"n_kv_heads": 1}, "5 blocks": {"n_layers": 5, "split_layer": 4},
    "bits": {"post_sampler": "bits", "n_kv_heads": 2},
}.items()}  # fmt: skip


@pytest.mark.parametrize("name", STREAMED)
def test_14_a_stream_cut_anywhere_equals_the_full_pass(name: str) -> None:
    @settings(max_examples=8)
    @example(cuts=set(range(1, 20)), padded=False)  # token by token
    @example(cuts=set(range(8, 20)), padded=True)
    @given(cuts=strategies.sets(strategies.integers(1, 19), max_size=4), padded=strategies.booleans())
    @torch.no_grad()
    def check(cuts: set[int], padded: bool) -> None:
        model, tokens, code, parts = STREAMED[name], tokens_of(2, 20), codes_of(2, 20), []
        mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(len(cuts))) > 0.3
        state, bounds = model.init_state(2), [0, *sorted(cuts), 20]
        for here in (slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)):
            masks = {"attention_mask": mask[:, here]} if padded else {}
            output = model.step(tokens[:, here], state, z=Plan(code[:, here]), **masks)
            state = output.state
            parts.append(output.logits)
            assert torch.equal(state.plan.code, code[:, : here.stop])
        whole = logits_of(model, tokens, code, **({"attention_mask": mask} if padded else {}))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)

    check()


def training_loss(model: FreeTransformer, tokens: Tensor) -> Tensor:
    half = model.lower(tokens[:, :-1])
    plan = model.sample_posterior(half, generator=torch.Generator().manual_seed(1))
    penalty = ops.free_bits(ops.kl_per_token(plan.logits), ops.bits_to_nats(0.01))
    return ops.cross_entropy(model.upper(half, plan).logits, tokens[:, 1:]) + penalty


@pytest.mark.parametrize(
    "make", [lambda c: FreeTransformer(c), lambda c: liven(FreeTransformer(c))], ids=["new", "lively"]
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("fields", [{}, {"post_sampler": "bits"}, {"n_latent_bits": 16}], ids=str)
def test_19_every_parameter_learns_from_the_first_step(
    make: Callable[[FreeTransformerConfig], FreeTransformer], autocast: bool, fields: dict
) -> None:
    model = make(FreeTransformerConfig(**SIZES | {"n_layers": 3} | fields)).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = training_loss(model, tokens_of(4, 33))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


MODEL = make_free()
"""Never changed."""


def test_bits_and_table_agree_where_the_table_is_built_of_bits() -> None:
    bits, table = BitsPostSampler(N_BITS, 6).double(), TablePostSampler(N_BITS, 6).double()
    with torch.no_grad():
        table.weight.copy_(bits(Plan(torch.arange(2**N_BITS).unsqueeze(0)))[0])
    code, logits = codes_of(2, 7), torch.randn(2, 7, N_BITS, dtype=torch.float64, requires_grad=True)
    plan = Plan(code, logits)
    torch.testing.assert_close(bits(plan), table(plan), rtol=1e-14, atol=1e-14)
    cotangent = torch.randn(2, 7, 6, dtype=torch.float64)
    gradients = [torch.autograd.grad(sampler(plan), logits, cotangent)[0] for sampler in (bits, table)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    slope = 2 * logits.sigmoid() * (1 - logits.sigmoid()) * (cotangent @ bits.proj.weight)
    torch.testing.assert_close(gradients[0], slope, rtol=1e-10, atol=1e-14)
