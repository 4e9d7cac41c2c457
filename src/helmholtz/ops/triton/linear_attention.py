"""Linear attention, ``S_t = e^{g_t} S_{t-1} + k_t v_t^T`` and ``o_t = S_t^T q_t``, in chunks of L = 64 steps.

With ``w_ij`` what decays from step j to step i of a chunk, ``a_i`` from its start to i and ``b_j`` from j to its end,

    P = (q k^T) w,  o = P v + (a q) S,  S' = a_L S + (b k)^T v.

Three phases: what each chunk adds to the state, all at once; the states before the chunks, one after another but all
their numbers at once; what each chunk reads, all at once. Backward is alike: the gradient of the states from the end,
then dq, dk, dg of each chunk and block of keys and dv of each chunk and block of values.

With `normalize` the values have one more column, of ones, by whose result the others are divided: the mass. It is no
column of a product but a sum in float32. States are kept in float32, a chunk's values first, then its masses, so that
rows stay whole lines. Decays are sums of logarithms over just the steps between, never differences: a restart is a
decay of -inf.

Floor: L/2 (K + V) + 2 K V multiply-adds per step forward, L K + 3/2 L (K + V) + 5 K V backward; q, k, v in and o out,
and 4 K V / L bytes of states per step, written, carried and read. Here whole squares of a chunk are multiplied, not
their lower halves, and P and its gradient are made again by every kernel that needs them. Products that have a factor
in float32 are taken to its accuracy (`Target.float32_dot`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helmholtz.kernels.operators import CHUNK, _of_heads
from helmholtz.ops.triton._shared import launch, power_of_2, target, with_whole_rows

WIDEST, PART, NUMBERS = 32, 16, 256
"""Columns of a block of keys or values, steps of a part of a chunk, as many as registers hold of products whose factors
are split; and numbers of the state that a program carries along."""


@triton.jit
def _rows(X, time, stride, columns, steps, width):
    """Rows of one head: time x columns."""
    inside = (time < steps)[:, None] & (columns < width)[None, :]
    return tl.load(X + time[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put_rows(X, value, time, stride, columns, steps, width):
    inside = (time < steps)[:, None] & (columns < width)[None, :]
    tl.store(X + time[:, None] * stride + columns[None, :], value, mask=inside)


@triton.jit
def _matrix(S, rows, columns, height, width):
    """Of the values' states: keys x values."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(S + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Factors of one narrow type go in as they are, all else to float32's accuracy."""
    if (a.dtype == b.dtype) and (a.dtype != tl.float32):
        return tl.dot(a, b)
    else:  # what follows a return is compiled all the same
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _logs(G, time, last, steps):
    """Log decays of the steps up to ``last``; of others 0."""
    return tl.load(G + time, mask=(time <= last) & (time < steps), other=0.0)


@triton.jit
def _since(G, time, last, steps):
    return tl.exp(tl.cumsum(_logs(G, time, last, steps), 0))


@triton.jit
def _until(G, time, last, steps):
    """Of whole chunks."""
    return tl.exp(tl.cumsum(_logs(G, time + 1, last, steps), 0, reverse=True))


@triton.jit
def _until_of(G, source, time, last, steps):
    """Of some steps of a chunk."""
    logs = _logs(G, time, last, steps)[:, None]
    return tl.exp(tl.sum(tl.where(time[:, None] > source[None, :], logs, 0.0), axis=0))


@triton.jit
def _between(G, time, source, last, steps):
    """w, of the steps after the column up to the row; 1 above the diagonal."""
    logs = _logs(G, time, last, steps)[:, None]
    return tl.exp(tl.cumsum(tl.where(time[:, None] > source[None, :], logs, 0.0), 0))


@triton.jit
def _inverse(Mass, time, steps):
    """1 / mass; 1 where there is none."""
    mass = tl.load(Mass + time, mask=time < steps, other=0.0)
    return tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 1.0)


@triton.jit
def _gradient(D, Mass, time, stride, columns, steps, width, NORMALIZE: tl.constexpr):
    """That of the sums, from that of their quotients."""
    d = _rows(D, time, stride, columns, steps, width).to(tl.float32)
    if NORMALIZE:
        d *= _inverse(Mass, time, steps)[:, None]
    return d


@triton.jit
def _masses(
    D, Out, Mass, Dmass, steps, heads, width, d_b, d_h, d_t, out_b, out_h, out_t,
    L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the masses: a quotient falls with what divides it."""
    part, time = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * L + tl.arange(0, L)
    D, Out = D + part // heads * d_b + part % heads * d_h, Out + part // heads * out_b + part % heads * out_h
    total = tl.zeros([L], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        d = _rows(D, time, d_t, columns, steps, width).to(tl.float32)
        total += tl.sum(d * _rows(Out, time, out_t, columns, steps, width).to(tl.float32), axis=1)
    mass = tl.load(Mass + part * steps + time, mask=time < steps, other=0.0)
    seen = mass > 0.0
    tl.store(
        Dmass + part * steps + time,
        tl.where(seen, -total / tl.where(seen, mass, 1.0), 0.0),
        mask=time < steps,
    )


@triton.jit
def _add(
    X, Y, G, Mass, Dmass, States, steps, heads, keys, values, x_b, x_h, x_t, y_b, y_h, y_t,
    BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, ``(b k)^T v``, or to the state's gradient, ``(a q)^T d``."""
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(values, VALUES)
    rows = tl.program_id(2) // blocks * KEYS + tl.arange(0, KEYS)
    columns = tl.program_id(2) % blocks * VALUES + tl.arange(0, VALUES)
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    X, Y = X + part // heads * x_b + part % heads * x_h, Y + part // heads * y_b + part % heads * y_h
    x = _rows(X, time, x_t, rows, steps, keys)
    if BACKWARD:
        y = _gradient(Y, Mass + part * steps, time, y_t, columns, steps, values, NORMALIZE)
        if G is not None:
            x = x.to(tl.float32) * _since(G + part * steps, time, last, steps)[:, None]
    else:
        y = _rows(Y, time, y_t, columns, steps, values)
        if G is not None:
            x = x.to(tl.float32) * _until(G + part * steps, time, last, steps)[:, None]
    States += (part * tl.num_programs(1) + chunk) * keys * (values + NORMALIZE)
    inside = (rows < keys)[:, None] & (columns < values)[None, :]
    tl.store(
        States + rows[:, None] * values + columns[None, :], _product(tl.trans(x), y, PRECISION), mask=inside
    )
    if NORMALIZE:  # noqa: SIM102 (known when it is compiled)
        if tl.program_id(2) % blocks == 0:
            weights = x.to(tl.float32)
            if BACKWARD:
                weights *= tl.load(Dmass + part * steps + time, mask=time < steps, other=0.0)[:, None]
            tl.store(States + keys * values + rows, tl.sum(weights, axis=0), mask=rows < keys)


@triton.jit
def _carry(
    States, First, Final, G, steps, chunks, keys, values, columns,
    BACKWARD: tl.constexpr, L: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Puts in the place of what each chunk adds the state before it (its gradient after it). The next chunk's is read
    before this one's is written: neither waits."""
    part, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    inside, of_values = at < keys * columns, at < keys * values
    row, column = (
        tl.where(of_values, at // values, at - keys * values),
        tl.where(of_values, at % values, values),
    )
    outside = part * keys * columns + row * columns + column
    s = tl.load(First + outside, mask=inside, other=0.0)
    States += part * chunks * keys * columns + at
    size, time = (keys * columns).to(tl.int64), tl.arange(0, L).to(tl.int64)
    added = s
    for i in range(-1, chunks):
        chunk = chunks - 1 - i if BACKWARD else i
        following = chunk - 1 if BACKWARD else chunk + 1
        left = tl.minimum(chunks - 1 - i, 1) * keys * columns
        more = tl.load(States + following * size, mask=at < left, other=0.0)
        if i >= 0:
            tl.store(States + chunk * size, s, mask=inside)
            if G is not None:
                s *= tl.exp(tl.sum(_logs(G + part * steps, chunk * L + time, chunk * L + L - 1, steps), 0))
            s += added
        added = more
    tl.store(Final + outside, s, mask=inside)


@triton.jit
def _weights(
    Q, K, G, time, source, last, steps, keys, q_t, k_t,
    STRICT: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """P of a part of the chunk's steps as sources, summed over all keys."""
    p = tl.zeros([L, PART], tl.float32)
    for first in range(0, keys, KEYS):
        rows = first + tl.arange(0, KEYS)
        q, k = _rows(Q, time, q_t, rows, steps, keys), _rows(K, source, k_t, rows, steps, keys)
        p += _product(q, tl.trans(k), PRECISION)
    if G is not None:
        p *= _between(G, time, source, last, steps)
    return tl.where(time[:, None] >= source[None, :] + STRICT, p, 0.0)


@triton.jit
def _read(
    Q, K, V, G, States, Out, Mass, steps, heads, keys, values, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = part // heads, part % heads
    columns = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    Q, K, V = Q + batch * q_b + head * q_h, K + batch * k_b + head * k_h, V + batch * v_b + head * v_h
    States += (part * tl.num_programs(1) + chunk) * keys * (values + NORMALIZE)
    if G is not None:
        G += part * steps
    o, mass = tl.zeros([L, VALUES], tl.float32), tl.zeros([L], tl.float32)
    for first in range(0, keys, KEYS):
        rows = first + tl.arange(0, KEYS)
        q = _rows(Q, time, q_t, rows, steps, keys).to(tl.float32)
        o += _product(q, _matrix(States, rows, columns, keys, values), PRECISION)
        if NORMALIZE:
            mass += tl.sum(
                q * tl.load(States + keys * values + rows, mask=rows < keys, other=0.0)[None, :], axis=1
            )
    if G is not None:
        since = _since(G, time, last, steps)
        o *= since[:, None]
        mass *= since
    for first in range(0, L, PART):
        source = chunk * L + first + tl.arange(0, PART)
        p = _weights(Q, K, G, time, source, last, steps, keys, q_t, k_t, STRICT, PRECISION, L, PART, KEYS)
        o += _product(p, _rows(V, source, v_t, columns, steps, values), PRECISION)
        mass += tl.sum(p, axis=1)
    if NORMALIZE:
        o *= tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 1.0)[:, None]
        if tl.program_id(2) == 0:
            tl.store(Mass + part * steps + time, mass, mask=time < steps)
    _put_rows(Out + (batch * steps * heads + head) * values, o, time, heads * values, columns, steps, values)


@triton.jit
def _pull(
    V, G, D, Mass, Dmass, part, time, source, last, steps, values, v_t, d_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The gradient of the products q k^T, of a part of the chunk's steps as sources."""
    dp = tl.zeros([L, PART], tl.float32)
    for first in range(0, values, VALUES):
        columns = first + tl.arange(0, VALUES)
        d = _gradient(D, Mass + part * steps, time, d_t, columns, steps, values, NORMALIZE)
        dp += _product(d, tl.trans(_rows(V, source, v_t, columns, steps, values)), PRECISION)
    if NORMALIZE:
        dp += tl.load(Dmass + part * steps + time, mask=time < steps, other=0.0)[:, None]
    if G is not None:
        dp *= _between(G + part * steps, time, source, last, steps)
    return tl.where(time[:, None] >= source[None, :] + STRICT, dp, 0.0)


@triton.jit
def _queries_back(
    Q, K, V, G, D, Mass, Dmass, States, Dstates, Dq, Dg, steps, heads, keys, values,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dq of a block of keys, and its part of what passes through the state before the chunk in dg: step s is between
    that state and all that is read of it from s on, the state after the chunk included."""
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = part // heads, part % heads
    rows = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    K, V, D = K + batch * k_b + head * k_h, V + batch * v_b + head * v_h, D + batch * d_b + head * d_h
    at = (part * tl.num_programs(1) + chunk) * keys * (values + NORMALIZE)
    States, Dstates = States + at, Dstates + at
    through = 0.0
    dq = tl.zeros([L, KEYS], tl.float32)
    for first in range(0, values, VALUES):
        columns = first + tl.arange(0, VALUES)
        d = _gradient(D, Mass + part * steps, time, d_t, columns, steps, values, NORMALIZE)
        s = _matrix(States, rows, columns, keys, values)
        dq += _product(d, tl.trans(s), PRECISION)
        through += tl.sum(s * _matrix(Dstates, rows, columns, keys, values))
    if NORMALIZE:
        s = tl.load(States + keys * values + rows, mask=rows < keys, other=0.0)
        dq += tl.load(Dmass + part * steps + time, mask=time < steps, other=0.0)[:, None] * s[None, :]
        through += tl.sum(s * tl.load(Dstates + keys * values + rows, mask=rows < keys, other=0.0))
    if G is not None:
        dq *= _since(G + part * steps, time, last, steps)[:, None]
        q = _rows(Q + batch * q_b + head * q_h, time, q_t, rows, steps, keys)
        dg = tl.cumsum(tl.sum(q.to(tl.float32) * dq, axis=1), 0, reverse=True)
        dg += through * tl.exp(tl.sum(_logs(G + part * steps, time, last, steps), 0))
        tl.store(Dg + (tl.program_id(2) * tl.num_programs(0) + part) * steps + time, dg, mask=time < steps)
    for first in range(0, L, PART):
        source = chunk * L + first + tl.arange(0, PART)
        dp = _pull(
            V, G, D, Mass, Dmass, part, time, source, last, steps, values, v_t, d_t,
            STRICT, NORMALIZE, PRECISION, L, PART, VALUES,
        )  # fmt: skip
        dq += _product(dp, _rows(K, source, k_t, rows, steps, keys), PRECISION)
    _put_rows(Dq + (batch * steps * heads + head) * keys, dq, time, heads * keys, rows, steps, keys)


@triton.jit
def _keys_back(
    Q, K, V, G, D, Mass, Dmass, Dstates, Dk, Dg, steps, heads, keys, values,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dk of a block of keys, and its part of what reaches the state after the chunk in dg: step s is between that state
    and all that is written before s."""
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = part // heads, part % heads
    rows = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    K, V, D = K + batch * k_b + head * k_h, V + batch * v_b + head * v_h, D + batch * d_b + head * d_h
    Q += batch * q_b + head * q_h
    Dstates += (part * tl.num_programs(1) + chunk) * keys * (values + NORMALIZE)
    dg = tl.zeros([L], tl.float32)
    for start in range(0, L, PART):
        source = chunk * L + start + tl.arange(0, PART)
        dk = tl.zeros([PART, KEYS], tl.float32)
        for first in range(0, values, VALUES):
            columns = first + tl.arange(0, VALUES)
            v = _rows(V, source, v_t, columns, steps, values)
            dk += _product(v, tl.trans(_matrix(Dstates, rows, columns, keys, values)), PRECISION)
        if NORMALIZE:
            dk += tl.load(Dstates + keys * values + rows, mask=rows < keys, other=0.0)[None, :]
        dp = _pull(
            V, G, D, Mass, Dmass, part, time, source, last, steps, values, v_t, d_t,
            STRICT, NORMALIZE, PRECISION, L, PART, VALUES,
        )  # fmt: skip
        q = _rows(Q, time, q_t, rows, steps, keys)
        if G is not None:
            k = _rows(K, source, k_t, rows, steps, keys)
            dk *= _until_of(G + part * steps, source, time, last, steps)[:, None]
            writes = tl.sum(k.to(tl.float32) * dk, axis=1)
            dg += tl.sum(tl.where(time[:, None] > source[None, :], writes[None, :], 0.0), axis=1)
        dk += _product(tl.trans(dp), q, PRECISION)
        _put_rows(Dk + (batch * steps * heads + head) * keys, dk, source, heads * keys, rows, steps, keys)
    if G is not None:
        tl.store(Dg + (tl.program_id(2) * tl.num_programs(0) + part) * steps + time, dg, mask=time < steps)


@triton.jit
def _decays_back(
    Q, K, V, G, D, Mass, Dmass, Dg, steps, heads, keys, values,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What the pairs inside the chunk give to dg: step s separates sources before it from queries from s on."""
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = part // heads, part % heads
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    Q, K, V = Q + batch * q_b + head * q_h, K + batch * k_b + head * k_h, V + batch * v_b + head * v_h
    D += batch * d_b + head * d_h
    dg = tl.zeros([L], tl.float32)
    for first in range(0, L, PART):
        source = chunk * L + first + tl.arange(0, PART)
        pairs = _weights(
            Q, K, None, time, source, last, steps, keys, q_t, k_t, STRICT, PRECISION, L, PART, KEYS
        )
        pairs *= _pull(
            V, G, D, Mass, Dmass, part, time, source, last, steps, values, v_t, d_t,
            STRICT, NORMALIZE, PRECISION, L, PART, VALUES,
        )  # fmt: skip
        earlier = time[:, None] > source[None, :]
        pairs = tl.cumsum(tl.where(earlier, pairs, 0.0), 0, reverse=True)
        dg += tl.sum(tl.where(earlier, pairs, 0.0), axis=1)
    tl.store(Dg + part * steps + time, dg, mask=time < steps)


@triton.jit
def _values_back(
    Q, K, G, D, Mass, Dstates, Dv, steps, heads, keys, values,
    q_b, q_h, q_t, k_b, k_h, k_t, d_b, d_h, d_t,
    STRICT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = part // heads, part % heads
    columns = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    time, last = chunk * L + tl.arange(0, L), chunk * L + L - 1
    Q, K, D = Q + batch * q_b + head * q_h, K + batch * k_b + head * k_h, D + batch * d_b + head * d_h
    Dstates += (part * tl.num_programs(1) + chunk) * keys * (values + NORMALIZE)
    if G is not None:
        G += part * steps
    d = _gradient(D, Mass + part * steps, time, d_t, columns, steps, values, NORMALIZE)
    for start in range(0, L, PART):
        source = chunk * L + start + tl.arange(0, PART)
        dv = tl.zeros([PART, VALUES], tl.float32)
        for first in range(0, keys, KEYS):
            rows = first + tl.arange(0, KEYS)
            k = _rows(K, source, k_t, rows, steps, keys)
            dv += _product(k, _matrix(Dstates, rows, columns, keys, values), PRECISION)
        if G is not None:
            dv *= _until_of(G, source, time, last, steps)[:, None]
        p = _weights(Q, K, G, time, source, last, steps, keys, q_t, k_t, STRICT, PRECISION, L, PART, KEYS)
        dv += _product(tl.trans(p), d, PRECISION)
        _put_rows(
            Dv + (batch * steps * heads + head) * values, dv, source, heads * values, columns, steps, values
        )


def _block(width: int) -> int:
    return min(WIDEST, power_of_2(width, 16))


def _states(
    x: Tensor, y: Tensor, g: Tensor | None, mass: Tensor, dmass: Tensor | None, first: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    """The states before the chunks and after the last, or their gradients after the chunks and before the first."""
    batch, heads, steps, values = y.shape
    keys, columns, chunks, parts = x.shape[3], first.shape[3], -(-steps // CHUNK), batch * heads
    states, final = first.new_empty((batch, heads, chunks, keys, columns)), torch.empty_like(first)
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 8}
    grid = parts, chunks, -(-keys // blocks["KEYS"]) * -(-values // blocks["VALUES"])
    strides = *x.stride()[:3], *y.stride()[:3]
    launch(
        _add, grid, x, y, g, mass, dmass, states, steps, heads, keys, values, *strides, BACKWARD=backward,
        NORMALIZE=columns > values, PRECISION=target().float32_dot, L=CHUNK, **blocks,
    )  # fmt: skip
    launch(
        _carry, (parts, -(-keys * columns // NUMBERS)), states, first, final, g, steps, chunks, keys, values, columns,
        BACKWARD=backward, L=CHUNK, NUMBERS=NUMBERS, num_warps=2,
    )  # fmt: skip
    return states, final


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, strict: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    (batch, heads, steps, values), keys = v.shape, q.shape[3]
    g, state = None if log_decay is None else log_decay.contiguous(), state.contiguous()
    out = _of_heads(v, values, state.dtype)
    mass = state.new_empty((batch, heads, steps if normalize else 0))
    states, last = _states(k, v, g, mass, None, state, False)
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 4}
    launch(
        _read, (batch * heads, states.shape[2], -(-values // blocks["VALUES"])), q, k, v, g, states, out, mass,
        steps, heads, keys, values, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        STRICT=strict, NORMALIZE=normalize, PRECISION=target().float32_dot, L=CHUNK, PART=PART, **blocks,
    )  # fmt: skip
    return out, last, states, mass


def linear_attention_backward(
    dout: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
    out: Tensor, starts: Tensor, mass: Tensor, strict: bool, normalize: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    d, out, q, k, v = (with_whole_rows(x) for x in (dout, out, q, k, v))
    (batch, heads, steps, values), keys, chunks = v.shape, q.shape[3], starts.shape[2]
    parts, g = batch * heads, None if log_decay is None else log_decay.contiguous()
    blocks = {"KEYS": _block(keys), "VALUES": _block(values), "num_warps": 4}
    per_keys, per_values = (-(-n // b) for n, b in ((keys, blocks["KEYS"]), (values, blocks["VALUES"])))
    dmass = None
    if normalize:
        dmass = torch.empty_like(mass)
        sizes = steps, heads, values, *d.stride()[:3], *out.stride()[:3]
        launch(
            _masses,
            (parts, chunks),
            d,
            out,
            mass,
            dmass,
            *sizes,
            L=CHUNK,
            BLOCK=blocks["VALUES"],
            num_warps=4,
        )
    first = torch.zeros_like(state) if dlast is None else dlast.contiguous()
    dstates, dstate = _states(q, d, g, mass, dmass, first, True)
    dq, dk, dv = (_of_heads(x, x.shape[3], x.dtype) for x in (q, k, v))
    dg = None if g is None else g.new_empty((2 * per_keys + 1, *g.shape))
    of_queries, of_sources = (None, None) if dg is None else (dg[:per_keys], dg[per_keys:])
    sizes, options = (
        (steps, heads, keys, values),
        {"PRECISION": target().float32_dot, "L": CHUNK, "PART": PART, **blocks},
    )
    options |= {"STRICT": strict, "NORMALIZE": normalize}
    of_keys, of_d = (*q.stride()[:3], *k.stride()[:3]), d.stride()[:3]
    places = *sizes, *of_keys, *v.stride()[:3], *of_d
    inputs, grid = (q, k, v, g, d, mass, dmass), (parts, chunks, per_keys)
    launch(_queries_back, grid, *inputs, starts, dstates, dq, of_queries, *places, **options)
    launch(_keys_back, grid, *inputs, dstates, dk, of_sources, *places, **options)
    if dg is not None:
        launch(_decays_back, (parts, chunks), *inputs, dg[-1], *places, **options)
    launch(
        _values_back, (parts, chunks, per_values), q, k, g, d, mass, dstates, dv, *sizes, *of_keys, *of_d, **options
    )  # fmt: skip
    return dq, dk, dv, state.new_empty(0) if dg is None else dg.sum(0), dstate


def _call(
    new: Any,
    keys: int,
    values: int,
    narrow: torch.dtype,
    wide: torch.dtype,
    *,
    decay: bool = True,
    mass: bool = True,
) -> tuple[Any, ...]:
    q, k, v = (new(2, 3, 200, n, dtype=t) for n, t in ((keys, narrow), (keys, narrow), (values, wide)))
    return q, k, v, new(2, 3, 200) if decay else None, new(2, 3, keys, values + mass), not mass, mass


def _backward_call(new: Any, keys: int, values: int, *others: Any, **options: Any) -> tuple[Any, ...]:
    *inputs, strict, mass = _call(new, keys, values, *others, **options)
    out, starts = new(2, 3, 200, values), new(2, 3, 4, keys, values + mass)
    return out, None, *inputs, out, starts, new(2, 3, 200 if mass else 0), strict, mass


_SORTS: dict[str, tuple[tuple[Any, ...], dict[str, bool]]] = {
    "bf16 signals fp32 64 128": ((64, 128, torch.bfloat16, torch.float32), {}),
    "bf16 128 128": ((128, 128, torch.bfloat16, torch.bfloat16), {}),
    "fp16 256 256": ((256, 256, torch.float16, torch.float16), {}),
    "fp32 64 128": ((64, 128, torch.float32, torch.float32), {}),
    "bf16 64 64 no decay": ((64, 64, torch.bfloat16, torch.float32), {"decay": False}),
    "bf16 16 64 strict": ((16, 64, torch.bfloat16, torch.bfloat16), {"mass": False}),
}
CALLS: dict[str, tuple[str, Any]] = {}
for _label, (_sizes, _options) in _SORTS.items():
    CALLS[_label] = ("linear_attention", lambda new, s=_sizes, o=_options: _call(new, *s, **o))
    CALLS[_label + " backward"] = (
        "linear_attention_backward",
        lambda new, s=_sizes, o=_options: _backward_call(new, *s, **o),
    )
