"""The kernels of the recurrences at the sizes of their blocks, in one call each: several tiles, chunks and blocks, none
of them full, restarts, pads, and numbers at the ends of their range. The operations' own tests go over shapes."""

import pytest
import torch

from helmholtz import kernels
from helmholtz.ops import causal_conv
from helmholtz.ops._chunks import chunked_sums
from helmholtz.ops.linear_attention import linear_average
from helmholtz.ops.rnn_softmax import RNNSoftmaxState, rnn_softmax
from helmholtz.ops.scan import first_order_scan, leaky_scan
from helmholtz.ops.selective_scan import selective_average, selective_scan
from helpers import assert_matches, grads


def agrees(call, leaves, *, budget):
    """Outputs and gradients with those of the plain form in float64."""
    with kernels.plain_forms():
        exact = [x.double() for x in leaves]
        expected = call(*exact)
        cotangents = [torch.randn_like(x) for x in expected]
        wanted = grads(call, exact, cotangents)
    for i, (a, e) in enumerate(zip(call(*leaves), expected, strict=True)):
        assert_matches(f"output {i}", a, e, budget=budget)
    for i, (a, e) in enumerate(zip(grads(call, leaves, cotangents), wanted, strict=True)):
        assert_matches(f"gradient {i}", a, e, budget=budget)


def restarts(batch, time):
    reset = torch.rand(batch, time) < 0.06
    reset[0, time // 2 :] = False
    reset[-1, 0] = time > 1
    return reset


@pytest.mark.parametrize("time", [1, 90, 600])
@pytest.mark.parametrize("scan", [first_order_scan, leaky_scan])
def test_scan(scan, time):
    """Also in spans, which it is cut into where it is long and there are few channels."""
    decay = torch.rand(1, time, 40).pow(0.1) if scan is first_order_scan else torch.randn(1, time, 40) - 4
    reset = restarts(1, time) if time == 90 else None
    leaves = [decay, torch.randn(1, time, 40), torch.randn(1, 40)]
    agrees(lambda a, x, state: scan(a, x, state=state, reset=reset), leaves, budget=8)


@pytest.mark.parametrize("time", [1, 50])
@pytest.mark.parametrize("signals", [1, 2])
def test_rnn_softmax(time, signals):
    keys, top = 3 * torch.randn(2, time, 40), torch.randn(2, 40)
    keys[0, :, 3], keys[:, time // 3, 5:7], keys[:, :, 9] = -torch.inf, 80.0, keys[:, :, 9] - 85
    top[0, 3] = -torch.inf
    reset = restarts(2, time)

    def call(x, sums, k):
        sums = sums * ~top.isneginf().unsqueeze(1)  # nothing was there
        y, last = rnn_softmax(k, x, state=RNNSoftmaxState(top.to(k), sums), reset=reset)
        return y, last.sums

    leaves = [torch.randn(2, time, signals, 40), torch.rand(2, signals + 1, 40), keys]
    agrees(call, leaves, budget=8)


@pytest.mark.parametrize("time", [1, 75])
@pytest.mark.parametrize("normalize", [False, True])
def test_selective_scan(time, normalize):
    delta, rates = torch.rand(2, time, 18), -3 * torch.rand(18, 3)
    delta[0, ::5], rates[2] = 0.0, -100.0
    b, c = (torch.rand(2, time, 3) + 0.1 for _ in range(2))
    reset = restarts(2, time)

    def call(u, delta, rates, b, c, skip, state):
        if normalize:
            return selective_average(u, delta, rates, b, c, skip, state=state, reset=reset)
        return selective_scan(u.flatten(3), delta, rates, b, c, skip, state=state, reset=reset)

    leaves = [
        torch.randn(2, time, 2, 2, 9),
        delta,
        rates,
        b,
        c,
        torch.rand(18) + 0.1,
        torch.rand(2, 2 + normalize, 18, 3),
    ]
    agrees(call, leaves, budget=16)


@pytest.mark.parametrize("time", [1, 150])
@pytest.mark.parametrize("kind", ["average", "average without decay", "sums", "strict"])
def test_linear_attention(time, kind):
    q, k, v = (torch.rand(1, 2, time, n) for n in (40, 40, 72))
    decay, state = -torch.rand(1, 2, time), torch.rand(1, 2, 40, 72 + ("average" in kind))
    decay[0, 0, ::7] = -90.0
    reset = restarts(1, time)

    def call(q, k, v, decay, state):
        if kind == "average":
            return linear_average(q, k, v, decay, state=state, reset=reset)
        if kind == "average without decay":
            return linear_average(q, k, v, state=state + 0 * decay.sum())
        logs = torch.where(reset[:, None, :, None], -torch.inf, decay.unsqueeze(-1))
        return chunked_sums(q, k, v, logs, state, chunk=64, strict=kind == "strict")

    agrees(call, [q, k, v, decay, state], budget=16)


@pytest.mark.parametrize("time", [1, 70])
@pytest.mark.parametrize("taps", [1, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv(time, taps, packed):
    mask = torch.rand(2, time) < 0.7 if packed else None
    reset = restarts(2, time) if packed else None

    def call(x, weight, bias, state):
        activation = "silu" if taps > 1 else None
        return causal_conv(x, weight, bias, state=state, mask=mask, reset=reset, activation=activation)

    leaves = [
        torch.randn(2, time, 70),
        torch.randn(70, taps),
        torch.randn(70),
        torch.randn(2, taps - 1, 70),
    ]
    agrees(call, leaves, budget=8)


def test_no_sum_of_bf16_queries_overflows_or_is_rounded_between_chunks():
    """States stay float32: a mass of e^60 beside one of 1."""
    q, k = (torch.rand(1, 1, 150, 32).bfloat16() for _ in range(2))
    signals = torch.stack([torch.rand(150, 8), torch.rand(150, 8).mul(60).exp()], 1).flatten(1)[None, None]
    with kernels.plain_forms():
        expected, _ = linear_average(q.double(), k.double(), signals.double())
    assert_matches("averages", linear_average(q, k, signals)[0], expected, budget=8)
