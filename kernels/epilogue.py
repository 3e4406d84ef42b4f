"""What becomes of a tile of a product before it is stored: biases, activations and their derivatives.

Each function takes accumulators of some rows (slots) by some columns, in float32 or float64. LIMIT 0 and SHIFT 0 are
none, and ALPHA 1 is silu: plain swiglu has no instruction for them. Forms as in `kernels.form`.
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """An ungated activation and its derivative."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        cdf = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        slope = 1.5957691216057308 * (1 + 0.134145 * z * z)
        return z * cdf, cdf + z * cdf * (1 - cdf) * slope
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(z, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def gated(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """swiglu's value and its derivatives for the gate and the other column."""
    low = gate
    middle = up
    if LIMIT != 0:
        low = tl.where(gate > LIMIT, LIMIT, gate)
        middle = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    share = tl.sigmoid(low if ALPHA == 1 else ALPHA * low)
    silu = low * share
    rise = silu * (1 - share)
    slope = share + (rise if ALPHA == 1 else ALPHA * rise)
    other = middle if SHIFT == 0 else middle + SHIFT
    for_gate = other * slope
    for_up = silu
    if LIMIT != 0:
        for_gate = tl.where(gate > LIMIT, 0.0, for_gate)
        for_up = tl.where(tl.abs(up) > LIMIT, 0.0, for_up)
    return silu * other, for_gate, for_up


@triton.jit
def columns(acc, PARTS: tl.constexpr):
    """acc (rows, columns) cut into PARTS (a power of two) slices of columns, as a tuple."""
    if PARTS == 1:
        slices = (acc,)
    else:
        tl.static_assert(acc.shape[1] % PARTS == 0)
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        slices = columns(left, PARTS // 2) + columns(right, PARTS // 2)
    return slices


@triton.jit
def store(y, out, slot, live, start, END: tl.constexpr, STRIDE: tl.constexpr, FROM: tl.constexpr):
    """out[slot, FROM + c] = y for the columns c that begin at `start`, those below END; rows are STRIDE apart."""
    column = start + tl.arange(0, y.shape[1])[None, :]
    at = out + slot.to(tl.int64)[:, None] * STRIDE + (FROM + column)
    tl.store(at, y.to(out.dtype.element_ty), mask=live[:, None] & (column < END))


@triton.jit
def load(
    z, slot, live, start, WIDTH: tl.constexpr, END: tl.constexpr, STRIDE: tl.constexpr, FROM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """z[slot, FROM + c], as `store` has them; zeros where nothing is."""
    column = start + tl.arange(0, WIDTH)[None, :]
    at = z + slot.to(tl.int64)[:, None] * STRIDE + (FROM + column)
    return tl.load(at, mask=live[:, None] & (column < END), other=0.0).to(ACC)


@triton.jit
def add_bias(y, bias, e, start, END: tl.constexpr, STRIDE: tl.constexpr, FROM: tl.constexpr):
    """y plus bias[e, FROM + c], if there is one."""
    if bias is not None:
        column = start + tl.arange(0, y.shape[1])
        at = bias + e.to(tl.int64) * STRIDE + (FROM + column)
        y += tl.load(at, mask=column < END, other=0.0).to(y.dtype)[None, :]
    return y


@triton.jit
def store_gated(
    y, z, h, bias, w, e, slot, live, start, F: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGH: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """z = y + bias, if there is a z, and h = swiglu(z), for columns `start` on of h. y has gate and other columns in
    turns; z and the bias have them as w_up's rows are."""
    if INTERLEAVED:
        y = add_bias(y, bias, e, 2 * start, 2 * F, 2 * F, 0)
        if z is not None:
            store(y, z, slot, live, 2 * start, 2 * F, 2 * F, 0)
    gate, up = y.reshape(y.shape[0], y.shape[1] // 2, 2).split()
    if not INTERLEAVED:
        gate = add_bias(gate, bias, e, start, F, 2 * F, 0)
        up = add_bias(up, bias, e, start, F, 2 * F, F)
        if z is not None:
            store(gate, z, slot, live, start, F, 2 * F, 0)
            store(up, z, slot, live, start, F, 2 * F, F)
    if WEIGH:
        gate *= w[:, None]
        up *= w[:, None]
    value, _, _ = gated(gate, up, ALPHA, LIMIT, SHIFT)
    store(value, h, slot, live, start, F, F, 0)


@triton.jit
def store_activated(
    y, z, h, bias, w, e, slot, live, start, F: tl.constexpr, ACTIVATION: tl.constexpr, WEIGH: tl.constexpr
):
    """z = y + bias, if there is a z, and h = act(z), for an ungated activation."""
    y = add_bias(y, bias, e, start, F, F, 0)
    if z is not None:
        store(y, z, slot, live, start, F, F, 0)
    # Of z as it is stored, as the backward will read it; in its fewer bits it also takes fewer registers.
    y = y.to(h.dtype.element_ty).to(y.dtype)
    value, _ = activate(y * w[:, None] if WEIGH else y, ACTIVATION)
    store(value, h, slot, live, start, F, F, 0)


@triton.jit
def store_backward(
    dh, z, dz, h, w, slot, live, start, F: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    WEIGH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """dz = act'(z) dh w and w h, those that there are; returns <dh, h> over these columns, the gradient of w. Where the
    weight multiplies the input (WEIGH), z is without it: act' and h are of w z, h is stored as it is, and the gradient
    of w is <act'(w z) dh, z>."""
    WIDTH: tl.constexpr = dh.shape[1]
    if ACTIVATION == "swiglu":
        # The two sides of z, and what the activation makes of them.
        if INTERLEAVED:
            both = load(z, slot, live, 2 * start, 2 * WIDTH, 2 * F, 2 * F, 0, dh.dtype)
            gate, up = both.reshape(dh.shape[0], WIDTH, 2).split()
        else:
            gate = load(z, slot, live, start, WIDTH, F, 2 * F, 0, dh.dtype)
            up = load(z, slot, live, start, WIDTH, F, 2 * F, F, dh.dtype)
        if WEIGH:
            value, for_gate, for_up = gated(gate * w[:, None], up * w[:, None], ALPHA, LIMIT, SHIFT)
            for_gate *= dh
            for_up *= dh
            total = for_gate * gate + for_up * up
        else:
            value, for_gate, for_up = gated(gate, up, ALPHA, LIMIT, SHIFT)
            total = dh * value

        # dz, as z lies.
        if dz is not None:
            dgate = for_gate * w[:, None] if WEIGH else dh * w[:, None] * for_gate
            dup = for_up * w[:, None] if WEIGH else dh * w[:, None] * for_up
            if INTERLEAVED:
                store(tl.join(dgate, dup).reshape(dh.shape[0], 2 * WIDTH), dz, slot, live, 2 * start, 2 * F, 2 * F, 0)
            else:
                store(dgate, dz, slot, live, start, F, 2 * F, 0)
                store(dup, dz, slot, live, start, F, 2 * F, F)
    else:
        before = load(z, slot, live, start, WIDTH, F, F, 0, dh.dtype)
        value, slope = activate(before * w[:, None] if WEIGH else before, ACTIVATION)
        total = dh * (slope * before if WEIGH else value)
        if dz is not None:
            store(dh * w[:, None] * slope, dz, slot, live, start, F, F, 0)
    if h is not None:
        store(value if WEIGH else value * w[:, None], h, slot, live, start, F, F, 0)
    return tl.sum(total, 1)
