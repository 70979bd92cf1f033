"""What is launched: sums over chunks, sums over those, and the update of every chunk."""

# What is known at compile time is written as a type, and an `if` of it leaves names unset.
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false, reportMissingImports=false

from cruxy_torch._native.triton_kernels import (
    constexpr,
    jit,
    keep_moment,
    keep_plain,
    moment,
    places,
    plain,
    power,
    random_bits,
    tl,
)


@jit
def _measured(
    total0, total1, total2, total3, total4, grad, first, first_scales, param, at, left, scale,
    gamma,
    G: constexpr, M: constexpr, M_SHIFT: constexpr, M_TOP: constexpr, P: constexpr,
    POWER: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Adds the summands of a tile."""
    if G >= 0:
        g = plain(grad, at, left, G, MASKED, ALIGNED, ROWS) * scale
        a = tl.abs(g)
        total0 += g * g
        total1 += power(a, gamma, POWER)
        if M >= 0:
            m = moment(
                first, first_scales, at, left, M, True, M_SHIFT, M_TOP, MASKED, ALIGNED, ROWS
            )
            total2 += g * m
            total3 += m * m
    if P >= 0:
        p = plain(param, at, left, P, MASKED, ALIGNED, ROWS)
        total4 += p * p
    return total0, total1, total2, total3, total4


@jit
def _summed(total):
    return tl.sum(tl.sum(tl.sum(total, axis=2), axis=1), axis=0)


@jit
def sums_of_chunks(
    table, tensors, chunks, tiles, count, out, scale_at, gamma,
    G: constexpr, M: constexpr, M_SHIFT: constexpr, M_TOP: constexpr, P: constexpr,
    POWER: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """The five sums over each chunk: `g^2`, `|g|^gamma`, `g m`, `m^2`, `p^2`.

    Args:
        table: addresses and lengths, see `triton_tables`, whose rows are counted here.
        tensors: how many there are.
        chunks: tensor and number in it of each chunk.
        tiles: in a chunk.
        count: of chunks.
        out: `(5, count)`, float32. What is not asked for is 0.
        scale_at: factor on the gradients.
        gamma: the exponent.
        G: form of the gradients; -1 for none.
        M: of the first moments; -1 for none.
        M_SHIFT: of their code, as the next one.
        M_TOP: likewise.
        P: of the parameters; -1 for none.
        POWER: see `power`.
        ALIGNED: whether all tensors begin at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    chunk = tl.program_id(0)
    index = tl.load(chunks + 2 * chunk)
    begin = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * (tiles * (256 * ROWS))
    left = tl.load(table + 9 * tensors + index) - begin
    param, grad = tl.load(table + index), tl.load(table + tensors + index)
    first, scales = tl.load(table + 2 * tensors + index), tl.load(table + 3 * tensors + index)
    scale = tl.load(scale_at)
    zero = tl.zeros((ROWS, 2, 128), tl.float32)
    t0, t1, t2, t3, t4 = zero, zero, zero, zero, zero
    whole = tl.minimum(left // (256 * ROWS), tiles).to(tl.int32)
    for tile in range(whole):
        done = tile * (256 * ROWS)
        t0, t1, t2, t3, t4 = _measured(
            t0, t1, t2, t3, t4, grad, first, scales, param, begin + done, left - done, scale, gamma,
            G, M, M_SHIFT, M_TOP, P, POWER, False, ALIGNED, ROWS,
        )  # fmt: skip
    done = whole * (256 * ROWS)
    if (whole < tiles) & (done < left):
        t0, t1, t2, t3, t4 = _measured(
            t0, t1, t2, t3, t4, grad, first, scales, param, begin + done, left - done, scale, gamma,
            G, M, M_SHIFT, M_TOP, P, POWER, True, ALIGNED, ROWS,
        )  # fmt: skip
    tl.store(out + chunk, _summed(t0))
    tl.store(out + count + chunk, _summed(t1))
    tl.store(out + 2 * count + chunk, _summed(t2))
    tl.store(out + 3 * count + chunk, _summed(t3))
    tl.store(out + 4 * count + chunk, _summed(t4))


@jit
def sums_of_tensors(partial, count, starts, table, tensors, out, WIDTH: constexpr):
    """Of each tensor and each sum the sum over the tensor's chunks, in their order.

    Args:
        partial: from `sums_of_chunks`.
        count: of chunks.
        starts: number of each tensor's first chunk, and `count`.
        table: see there; the sign of `g m` is taken from it, and what `p^2` is divided by.
        tensors: how many there are.
        out: `(5, tensors)`, float32.
        WIDTH: chunks that are added at a time.
    """
    index, which = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(starts + index), tl.load(starts + index + 1)
    total = tl.zeros((WIDTH,), tl.float64)
    for at in range(begin, end, WIDTH):
        place = at + tl.arange(0, WIDTH)
        total += tl.load(partial + which * count + place, mask=place < end, other=0.0)
    value = tl.sum(total, axis=0)
    if which == 2:
        value = value * tl.load(table + 12 * tensors + index)
    if which == 4:
        value = value / tl.load(table + 14 * tensors + index).to(tl.float64)
    tl.store(out + which * tensors + index, value.to(tl.float32))


@jit
def sums_of_all(
    partial, count, chunks, starts, table, tensors, out, means, WIDTH: constexpr
):  # fmt: skip
    """The five sums over all chunks, in their order, and with more programs mean squares.

    The first five programs take a sum each. Each further one takes the sum of the squares of one
    tensor, over its count.

    Args:
        partial: see `sums_of_tensors`.
        count: likewise.
        chunks: tensor and number in it of each chunk.
        starts: see `sums_of_tensors`.
        table: likewise.
        tensors: likewise.
        out: float32, five.
        means: float32; the table has the place of each tensor's.
        WIDTH: chunks that are added at a time.
    """
    which = tl.program_id(0)
    total = tl.zeros((WIDTH,), tl.float64)
    if which < 5:
        for at in range(0, count, WIDTH):
            place = at + tl.arange(0, WIDTH)
            inside = place < count
            value = tl.load(partial + which * count + place, mask=inside, other=0.0)
            value = value.to(tl.float64)
            if which == 2:
                index = tl.load(chunks + 2 * place, mask=inside, other=0)
                value = value * tl.load(table + 12 * tensors + index, mask=inside, other=1)
            total += value
        tl.store(out + which, tl.sum(total, axis=0).to(tl.float32))
    else:
        index = which - 5
        begin, end = tl.load(starts + index), tl.load(starts + index + 1)
        for at in range(begin, end, WIDTH):
            place = at + tl.arange(0, WIDTH)
            total += tl.load(partial + 4 * count + place, mask=place < end, other=0.0)
        value = tl.sum(total, axis=0) / tl.load(table + 14 * tensors + index).to(tl.float64)
        tl.store(means + tl.load(table + 13 * tensors + index), value.to(tl.float32))


@jit
def moved(
    param, grad, first, first_scales, second, second_scales, mean, at, left, first_number, number,
    rate, beta1, beta2, scale, key, weight, pull, decay, eps, gain, spread,
    P: constexpr, P_CHANCE: constexpr, G: constexpr,
    M: constexpr, M_CHANCE: constexpr, M_SHIFT: constexpr, M_TOP: constexpr, M_LEAST: constexpr,
    V: constexpr, V_CHANCE: constexpr, V_SHIFT: constexpr, V_TOP: constexpr, V_LEAST: constexpr,
    NESTEROV: constexpr, COUPLED: constexpr, AVERAGED: constexpr, PULLED: constexpr,
    MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Updates a tile; see `update_of_chunks`, whose numbers it is given."""
    p = plain(param, at, left, P, MASKED, ALIGNED, ROWS)
    x = plain(grad, at, left, G, MASKED, ALIGNED, ROWS) * scale
    m = moment(first, first_scales, at, left, M, True, M_SHIFT, M_TOP, MASKED, ALIGNED, ROWS)
    if COUPLED:
        x = x + decay * p
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2
    if V >= 0:
        v = moment(second, second_scales, at, left, V, False, V_SHIFT, V_TOP, MASKED, ALIGNED, ROWS)
        m = beta1 * m + rest1 * x
        v = v * beta2 + (x * rest2) * x
        u = m
        if NESTEROV:
            u = beta1 * m + rest1 * x
        u = tl.div_rn(u * gain, tl.sqrt_rn(v * spread) + eps)
    else:
        u = beta1 * m + rest1 * x
        u = (u > 0.0).to(tl.float32) - (u < 0.0).to(tl.float32)
        m = beta2 * m + rest2 * x
    if not COUPLED:
        u = u + decay * p
    random = places(ROWS)
    if M_CHANCE or V_CHANCE:
        random = random_bits(key, (first_number + at).to(tl.int32) + places(ROWS))
    keep_moment(
        first, first_scales, at, left, m, random,
        M, M_CHANCE, True, M_SHIFT, M_TOP, M_LEAST, MASKED, ALIGNED, ROWS,
    )  # fmt: skip
    if V >= 0:
        keep_moment(
            second, second_scales, at, left, v, random,
            V, V_CHANCE, False, V_SHIFT, V_TOP, V_LEAST, MASKED, ALIGNED, ROWS,
        )  # fmt: skip
    if P_CHANCE:
        random = random_bits(key, (number + at).to(tl.int32) + places(ROWS))
    p = p - rate * u
    if PULLED:
        p = p + pull * (p - plain(mean, at, left, 0, MASKED, ALIGNED, ROWS))
    p = keep_plain(param, at, left, p, random, P, P_CHANCE, MASKED, ALIGNED, ROWS)
    if AVERAGED:
        a = plain(mean, at, left, 0, MASKED, ALIGNED, ROWS)
        apart = p - a
        near = tl.abs(weight) < 0.5  # torch's lerp, exact at both ends
        a = tl.where(near, a + weight * apart, p - apart * (1.0 - weight))
        keep_plain(mean, at, left, a, random, 0, False, MASKED, ALIGNED, ROWS)


@jit
def _weighed(product):
    """One over the weight of what a moment has seen; 1 where it has seen nothing."""
    return tl.div_rn(1.0, tl.where(product < 1.0, 1.0 - product, 1.0))


@jit
def update_of_chunks(
    table, tensors, chunks, tiles, starts, counters,
    rate_at, beta1_at, beta2_at, scale_at, ok_at, key_at, weight_at, pull_at, decay_scale_at,
    limits, decay, eps,
    P: constexpr, P_CHANCE: constexpr, G: constexpr,
    M: constexpr, M_CHANCE: constexpr, M_SHIFT: constexpr, M_TOP: constexpr, M_LEAST: constexpr,
    V: constexpr, V_CHANCE: constexpr, V_SHIFT: constexpr, V_TOP: constexpr, V_LEAST: constexpr,
    NESTEROV: constexpr, COUPLED: constexpr, AVERAGED: constexpr, PULLED: constexpr,
    LIMITED: constexpr, STEERED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """One step of Adam, or of Lion without second moments, and of the averages.

    The products of a tensor's decay rates are kept by the last of its programs, when all have read
    them. Nothing is written on a skipped step.

    Args:
        table: addresses, lengths and numbers, see `triton_tables`, whose rows are counted here.
        tensors: how many there are.
        chunks: tensor and number in it of each chunk.
        tiles: in a chunk.
        starts: number of each tensor's first chunk, and the number of all.
        counters: of programs that are done with a tensor; int32 zeros, and zeros again at the end.
        rate_at: this step's orders, see `Orders`, by their addresses.
        beta1_at: likewise.
        beta2_at: likewise.
        scale_at: likewise.
        ok_at: likewise.
        key_at: likewise.
        weight_at: likewise.
        pull_at: likewise.
        decay_scale_at: likewise.
        limits: the largest rates, by the place that the table has of each tensor.
        decay: coefficient of the weight decay.
        eps: added to the root of the second moment.
        P: form of the parameters: float32 (0) or bfloat16 (1).
        P_CHANCE: whether they are rounded by chance.
        G: form of the gradients.
        M: of the first moments; see `moment`.
        M_CHANCE: whether they are rounded by chance.
        M_SHIFT: of their code, as the next two.
        M_TOP: likewise.
        M_LEAST: likewise.
        V: the same of the second moments; -1 for Lion.
        V_CHANCE: likewise.
        V_SHIFT: likewise.
        V_TOP: likewise.
        V_LEAST: likewise.
        NESTEROV: looks one step ahead.
        COUPLED: adds the decay to the gradient.
        AVERAGED: whether there are averages.
        PULLED: whether parameters are pulled on from them; float32 alone.
        LIMITED: whether there are limits.
        STEERED: whether the law moves the decay.
        ALIGNED: whether all tensors begin at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    chunk = tl.program_id(0)
    index = tl.load(chunks + 2 * chunk)
    begin = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * (tiles * (256 * ROWS))
    if tl.load(ok_at) != 0:
        left = tl.load(table + 9 * tensors + index) - begin
        param, grad = tl.load(table + index), tl.load(table + tensors + index)
        first, first_scales = tl.load(table + 2 * tensors + index), param
        second, second_scales, mean = param, param, param
        if M >= 2:
            first_scales = tl.load(table + 3 * tensors + index)
        if V >= 0:
            second = tl.load(table + 4 * tensors + index)
        if V >= 2:
            second_scales = tl.load(table + 5 * tensors + index)
        if AVERAGED:
            mean = tl.load(table + 6 * tensors + index)
        first_number = tl.load(table + 10 * tensors + index)
        number = tl.load(table + 11 * tensors + index)
        rate, scale = tl.load(rate_at), tl.load(scale_at)
        weight, pull = tl.load(weight_at), tl.load(pull_at)
        beta1, beta2, key = tl.load(beta1_at), tl.load(beta2_at), tl.load(key_at)
        if LIMITED:
            limit = tl.load(limits + tl.load(table + 13 * tensors + index))
            rate = tl.where(limit < rate, limit, rate)
        if STEERED:
            decay = decay * tl.load(decay_scale_at)
        gain, spread = 1.0, 1.0
        if V >= 0:
            at1 = tl.load(table + 7 * tensors + index).to(tl.pointer_type(tl.float32))
            at2 = tl.load(table + 8 * tensors + index).to(tl.pointer_type(tl.float32))
            product1, product2 = tl.load(at1) * beta1, tl.load(at2) * beta2
            gain = _weighed(product1 * beta1) if NESTEROV else _weighed(product1)
            spread = _weighed(product2)
        whole = tl.minimum(left // (256 * ROWS), tiles).to(tl.int32)
        for tile in range(whole):
            done = tile * (256 * ROWS)
            moved(
                param, grad, first, first_scales, second, second_scales, mean,
                begin + done, left - done, first_number, number,
                rate, beta1, beta2, scale, key, weight, pull, decay, eps, gain, spread,
                P, P_CHANCE, G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST,
                V, V_CHANCE, V_SHIFT, V_TOP, V_LEAST, NESTEROV, COUPLED, AVERAGED, PULLED,
                False, ALIGNED, ROWS,
            )  # fmt: skip
        done = whole * (256 * ROWS)
        if (whole < tiles) & (done < left):
            moved(
                param, grad, first, first_scales, second, second_scales, mean,
                begin + done, left - done, first_number, number,
                rate, beta1, beta2, scale, key, weight, pull, decay, eps, gain, spread,
                P, P_CHANCE, G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST,
                V, V_CHANCE, V_SHIFT, V_TOP, V_LEAST, NESTEROV, COUPLED, AVERAGED, PULLED,
                True, ALIGNED, ROWS,
            )  # fmt: skip
        if V >= 0:
            # Of all programs of a tensor the last to add has acquired what the others released:
            # their reads, which the barrier puts in front of their addition, come before its write.
            last = tl.load(starts + index + 1) - tl.load(starts + index) - 1
            tl.debug_barrier()
            if tl.atomic_add(counters + index, 1, sem="acq_rel", scope="gpu") == last:
                tl.store(at1, product1)
                tl.store(at2, product2)
                tl.store(counters + index, 0)
