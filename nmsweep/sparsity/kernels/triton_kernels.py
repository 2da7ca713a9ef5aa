"""The kernels of the Triton backend without ν: groups as one stream, and one token without groups (with ν too).

ETA says what η is: 0 none, 1 a scalar, 2 [hidden], 3 [token].
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from .triton_network import keep_of_groups, load, sign, store
from .triton_numbers import from_float, magnitude, ratio_of_sums, score, to_float
from .triton_parts import load_patterns
from .triton_select import kth_lowest_of_keys


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


@triton.jit(do_not_specialize=["rows_per_weight", "n_groups"])
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
def _channels(x_ptr, weight_ptr, eta_ptr, row, weight_row, channel, hidden, ETA: tl.constexpr, KIND: tl.constexpr):
    """Bit patterns, z, keys (−1 beyond the token) and fills of some channels [T] of a token."""
    inside = channel < hidden
    x = tl.load(x_ptr + row * hidden + channel, mask=inside, other=0)
    if ETA == 0:
        eta = 0.0
        fill = tl.zeros_like(x)
    else:
        if ETA == 2:
            eta = tl.load(eta_ptr + channel, mask=inside, other=0.0)
        else:
            eta = tl.load(eta_ptr + (row if ETA == 3 else 0))
        fill = from_float(eta, KIND) + tl.zeros_like(x)
    z = to_float(x, KIND) - eta
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + weight_row * hidden + channel, mask=inside, other=0.0)
    key = tl.where(inside, score(z, weight, weight_ptr is None and ETA == 0), -1)
    return x, z, key, fill


@triton.jit
def _sums(z, kept, first, inside):
    """What ν needs of some channels: sums of z less the first, their squares, sums of what is kept, their squares."""
    shifted = tl.where(inside, z.to(tl.float64) - first.to(tl.float64), 0.0)
    sparse = (z.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.sum(shifted), tl.sum(shifted * shifted), tl.sum(sparse), tl.sum(sparse * sparse)


@triton.jit
def _write_channels(u_ptr, mask_ptr, row, channel, hidden, x, z, kept, fill, nu, VAR: tl.constexpr, KIND: tl.constexpr):
    """Write u, and the mask if asked, of some channels of a token."""
    inside = channel < hidden
    if VAR:
        rescaled = from_float(to_float(x, KIND) + (nu - 1.0) * z, KIND)
        x = tl.where(nu == 1.0, x, tl.where(z == 0.0, x, rescaled)).to(x.dtype)
    tl.store(u_ptr + row * hidden + channel, chosen(kept, x, fill), mask=inside)
    if mask_ptr is not None:
        tl.store(mask_ptr + row * hidden + channel, (kept & 1).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["rows_per_weight", "N"])
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
    N,
    KIND: tl.constexpr,
    ETA: tl.constexpr,
    VAR: tl.constexpr,
    T: tl.constexpr,
):
    """One token a program, without groups: of its channels, at most 2·T, the N highest are kept.

    Channel i is looked at together with channel i + T, as two halves of a word.
    """
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.arange(0, T), tl.arange(0, T) + T
    weight_row = row // rows_per_weight
    x_low, z_low, low_key, low_fill = _channels(x_ptr, weight_ptr, eta_ptr, row, weight_row, low, hidden, ETA, KIND)
    x_high, z_high, high_key, high_fill = _channels(
        x_ptr, weight_ptr, eta_ptr, row, weight_row, high, hidden, ETA, KIND
    )
    threshold = kth_lowest_of_keys(low_key, high_key, hidden - N)
    low_kept, high_kept = sign(threshold - low_key), sign(threshold - high_key)
    room = N + tl.sum(low_kept) + tl.sum(high_kept)
    low_equal, high_equal = (low_key == threshold).to(tl.int32), (high_key == threshold).to(tl.int32)
    n_low = tl.sum(low_equal)
    if n_low + tl.sum(high_equal) > room:  # of equals, those of lower channels
        low_equal = tl.where(tl.cumsum(low_equal, axis=0) <= room, low_equal, 0)
        high_equal = tl.where(tl.cumsum(high_equal, axis=0) <= room - n_low, high_equal, 0)
    low_kept, high_kept = low_kept - low_equal, high_kept - high_equal
    nu = 1.0
    if VAR:
        first = to_float(tl.load(x_ptr + row * hidden), KIND)
        if ETA == 3:
            first -= tl.load(eta_ptr + row)
        elif ETA > 0:
            first -= tl.load(eta_ptr)
        a, b, c, d = _sums(z_low, low_kept, first, low < hidden)
        e, f, g, h = _sums(z_high, high_kept, first, high < hidden)
        nu = ratio_of_sums(a + e, b + f, c + g, d + h, hidden)
        if nu_ptr is not None:
            tl.store(nu_ptr + row, nu)
    _write_channels(u_ptr, mask_ptr, row, low, hidden, x_low, z_low, low_kept, low_fill, nu, VAR, KIND)
    _write_channels(u_ptr, mask_ptr, row, high, hidden, x_high, z_high, high_kept, high_fill, nu, VAR, KIND)
    if counts_ptr is not None:
        n_kept = -(tl.sum(low_kept) + tl.sum(high_kept))
        tl.atomic_add(counts_ptr, n_kept.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
