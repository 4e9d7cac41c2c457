"""The kernels of linear attention (`helmholtz.ops.triton.linear_attention`)."""

import triton
import triton.language as tl


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
