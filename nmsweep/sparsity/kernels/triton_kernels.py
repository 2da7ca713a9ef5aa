"""The kernels of the Triton backend without ν: groups as one stream, and one token without groups (with ν too).

ETA says what η is: 0 none, 1 a scalar, 2 [hidden], 3 [token].
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from .triton_network import keep_of_groups, keep_of_row, load, store
from .triton_numbers import from_float, magnitude, score, to_float, total, variance_ratio
from .triton_parts import load_patterns


@triton.jit
def filling(
    eta_ptr,
    row,
    start,
    valid,
    ETA: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    PIECE: tl.constexpr,
):
    """η as fp32 and as bit pattern, for groups [G] that begin at channel `start` of token `row` ([] or [G, 1]). ETA: 0 none, 1 scalar, 2 [hidden], 3 [token]."""
    if ETA == 0:
        eta = 0.0
        fill = tl.full((), 0, tl.int16 if KIND < 2 else tl.int32)
    elif ETA == 1:
        eta = tl.load(eta_ptr)
        fill = from_float(eta, KIND)
    elif ETA == 2:
        eta = load(eta_ptr, start, valid, 0.0, M, P, PIECE)
        fill = from_float(eta, KIND)
    else:
        eta = tl.load(eta_ptr + row)
        fill = from_float(eta, KIND)
    return eta, fill


@triton.jit
def keys(
    x,
    z,
    weight_ptr,
    place,
    valid,
    ETA: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    PIECE: tl.constexpr,
):
    """What orders the channels of groups [G, P] of bit patterns x and values z, whose weights begin at `place` [G]."""
    if weight_ptr is None and ETA == 0 and KIND < 2:
        key = magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = load(weight_ptr, place, valid, 0.0, M, P, PIECE)
        key = score(z, weight, weight_ptr is None and ETA == 0)
    return key


@triton.jit
def chosen(kept, x, fill):
    """Bit pattern of x where all bits of `kept` are set, of the fill where none is."""
    kept = kept.to(x.dtype)
    return (x & kept) | (fill & ~kept)


@triton.jit
def flat_kernel(
    x_ptr,
    u_ptr,
    scale_ptr,
    gain_ptr,
    weight_ptr,
    eta_ptr,
    mask_ptr,
    counts_ptr,
    rows_per_weight,
    n_groups,
    groups_per_row,
    N: tl.constexpr,
    M: tl.constexpr,
    KIND: tl.constexpr,
    ETA: tl.constexpr,
    GAIN: tl.constexpr,
    PIECE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
):
    """G groups a program, across tokens."""
    group = tl.program_id(0) * G + tl.arange(0, G)
    valid = group < n_groups
    base = group.to(tl.int64) * M
    row = tl.minimum(group, n_groups - 1) // groups_per_row
    start = (group - row * groups_per_row) * M
    x = load_patterns(x_ptr, scale_ptr, gain_ptr, base, row, start, valid, GAIN, KIND, M, P, PIECE)
    eta, fill = filling(eta_ptr, row[:, None], start, valid, ETA, KIND, M, P, PIECE)
    place = (row // rows_per_weight).to(tl.int64) * (groups_per_row * M) + start
    key = keys(x, to_float(x, KIND) - eta, weight_ptr, place, valid, ETA, KIND, M, P, PIECE)
    kept = keep_of_groups(key, N, M, P)
    store(u_ptr, base, valid, chosen(kept, x, fill), M, P, PIECE)
    if mask_ptr is not None:
        store(mask_ptr, base, valid, (kept & 1).to(tl.int8), M, P, PIECE)
    if counts_ptr is not None:
        n_kept = tl.sum(tl.where(valid, -tl.sum(kept, axis=1), 0), axis=0)
        tl.atomic_add(counts_ptr, n_kept.to(tl.int64), sem="relaxed")
        if tl.program_id(0) == 0:
            tl.atomic_add(counts_ptr + 1, n_groups.to(tl.int64) * M, sem="relaxed")


@triton.jit
def row_kernel(
    x_ptr,
    u_ptr,
    weight_ptr,
    eta_ptr,
    mask_ptr,
    counts_ptr,
    nu_ptr,
    rows_per_weight,
    hidden,
    N: tl.constexpr,
    M: tl.constexpr,
    KIND: tl.constexpr,
    ETA: tl.constexpr,
    PIECE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    VAR: tl.constexpr,
):
    """One token a program, without groups: a tile [G, P] of which the N highest are kept."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, G)[:, None] * P + tl.arange(0, P)[None, :]
    inside = channel < hidden
    x = tl.load(x_ptr + row * hidden + channel, mask=inside, other=0)
    if ETA == 0:
        eta = 0.0
        fill = 0
    elif ETA == 2:
        eta = tl.load(eta_ptr + channel, mask=inside, other=0.0)
        fill = from_float(eta, KIND)
    else:
        eta = tl.load(eta_ptr + (row if ETA == 3 else 0))
        fill = from_float(eta, KIND)
    z = to_float(x, KIND) - eta
    if ETA == 0 and weight_ptr is None and KIND < 2:
        key = magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row // rows_per_weight * hidden + channel, mask=inside, other=0.0)
        key = score(z, weight, weight_ptr is None and ETA == 0)
    kept = keep_of_row(key, inside, N, key.dtype.primitive_bitwidth - 1)
    value = x
    if VAR:
        first = to_float(tl.load(x_ptr + row * hidden), KIND)
        if ETA == 3:
            first -= tl.load(eta_ptr + row)
        elif ETA > 0:
            first -= tl.load(eta_ptr)
        nu = variance_ratio(z, first, kept, inside, hidden)
        if nu_ptr is not None:
            tl.store(nu_ptr + row, nu)
        rescaled = from_float(to_float(x, KIND) + (nu - 1.0) * z, KIND)
        value = tl.where(nu == 1.0, x, tl.where(z == 0.0, x, rescaled))
    tl.store(u_ptr + row * hidden + channel, tl.where(kept, value, fill).to(x.dtype), mask=inside)
    if mask_ptr is not None:
        tl.store(mask_ptr + row * hidden + channel, kept.to(tl.int8), mask=inside)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, total(kept.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
