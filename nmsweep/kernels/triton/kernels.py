"""The kernels of the Triton backend that read one number at a time: groups as one stream, groups of one token with ν, one token
without groups, and η of each token (which can also be read as words).

ETA says what η is: 0 none, 1 a scalar, 2 [hidden], 3 [token].
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.network import keep_of_groups, load, sign, store, sum_of_squares
from nmsweep.kernels.triton.numbers import from_float, magnitude, mean, median, ratio_of_sums, score, to_float
from nmsweep.kernels.triton.parts import make_patterns
from nmsweep.kernels.triton.select import count_numbers, kth_lowest, next_bits, part_of_keys


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
    """Return η as fp32 and as bit pattern, for groups [G] that begin at channel `start` of token `row` ([] or [G, 1])."""
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
    """Return the keys that rank groups [G, P] of bit patterns x and values z, whose weights begin at `place` [G]."""
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
    """Return the bit pattern of x where all bits of `kept` are set, of the fill where none is."""
    kept = kept.to(x.dtype)
    return (x & kept) | (fill & ~kept)


@triton.jit
def to_rescale(x, eta, KIND: tl.constexpr):
    """Return what a kept channel holds until ν is known: x, or NaN if η is not finite, because the rescaled value will be NaN."""
    nan: tl.constexpr = 0x7FC0 if KIND == 0 else 0x7E00 if KIND == 1 else 0x7FC00000
    return tl.where(eta - eta == 0.0, x, nan).to(x.dtype)


@triton.jit
def rescaled(u, eta, fill, nu, KIND: tl.constexpr, GUARD: tl.constexpr):
    """Return u of channels that `to_rescale` kept, with their distance from η multiplied by ν; GUARD passes fills and channels where z is 0."""
    value = to_float(u, KIND)
    z = value - eta
    found = from_float(value + (nu - 1.0) * z, KIND)
    if GUARD:
        found = tl.where(z == 0.0, u, tl.where(u == fill, u, found)).to(u.dtype)
    return found


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
    """Prune G groups per program, across tokens."""
    group = tl.program_id(0) * G + tl.arange(0, G)
    valid = group < n_groups
    base = group.to(tl.int64) * M
    row = tl.minimum(group, n_groups - 1) // groups_per_row
    start = (group - row * groups_per_row) * M
    x = load(x_ptr, base, valid, 0, M, P, PIECE)
    if GAIN == 3:
        x = make_patterns(x, 1.0, load(gain_ptr, base, valid, 0, M, P, PIECE), GAIN, KIND)
    elif GAIN > 0:
        gain = load(gain_ptr, start, valid, 0, M, P, PIECE)
        x = make_patterns(x, tl.load(scale_ptr + row)[:, None], gain, GAIN, KIND)
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
            tl.atomic_add(counts_ptr + 1, tl.full((), M, tl.int64) * n_groups, sem="relaxed")


@triton.jit
def _first(x_ptr, eta_ptr, row, hidden, ETA: tl.constexpr, KIND: tl.constexpr):
    """Return the first z of a token (for η of channels: any value near it), so that a constant token has variance 0."""
    z = to_float(tl.load(x_ptr + row * hidden), KIND)
    if ETA == 3:
        z -= tl.load(eta_ptr + row)
    elif ETA > 0:
        z -= tl.load(eta_ptr)
    return z


@triton.jit
def rescale(
    u_ptr,
    eta_ptr,
    row,
    nu,
    hidden,
    GUARD: tl.constexpr,
    M: tl.constexpr,
    KIND: tl.constexpr,
    ETA: tl.constexpr,
    PIECE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
):
    """Multiply the distance of u from η by ν. With GUARD x passes where z is 0, which the formula alone ensures only for ν > 1."""
    n_groups = hidden // M
    for step in range(0, n_groups, G):
        group = step + tl.arange(0, G)
        valid = group < n_groups
        start = group * M
        base = row * hidden + start
        x = load(u_ptr, base, valid, 0, M, P, PIECE)
        eta, fill = filling(eta_ptr, row, start, valid, ETA, KIND, M, P, PIECE)
        store(u_ptr, base, valid, rescaled(x, eta, fill, nu, KIND, GUARD), M, P, PIECE)


@triton.jit
def scaled_kernel(
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
):
    """Prune one token per program with ν: prune G groups at a time into u, then rescale what differs from η.

    Each thread rereads only what it wrote itself. x passes where z is 0, so pruned channels need no mask.
    """
    # gives a constant token variance 0; sums of bfloat16 are exact there anyway, and a median or mean leaves 0
    SHIFT: tl.constexpr = KIND != 0 or ETA == 1 or ETA == 2
    row = tl.program_id(0).to(tl.int64)
    n_groups = hidden // M
    first = _first(x_ptr, eta_ptr, row, hidden, ETA, KIND)
    dense, dense_squares = tl.zeros((G,), tl.float64), tl.zeros((G,), tl.float64)
    sparse, sparse_squares = tl.zeros((G,), tl.float64), tl.zeros((G,), tl.float64)
    n_kept = tl.zeros((G,), tl.int32)
    for step in range(0, n_groups, G):
        group = step + tl.arange(0, G)
        valid = group < n_groups
        start = group * M
        base = row * hidden + start
        x = load(x_ptr, base, valid, 0, M, P, PIECE)
        eta, fill = filling(eta_ptr, row, start, valid, ETA, KIND, M, P, PIECE)
        z = to_float(x, KIND) - eta
        place = row // rows_per_weight * hidden + start
        key = keys(x, z, weight_ptr, place, valid, ETA, KIND, M, P, PIECE)
        kept = keep_of_groups(key, N, M, P)
        passed = to_rescale(x, eta, KIND) if ETA > 0 else x
        store(u_ptr, base, valid, chosen(kept, passed, fill), M, P, PIECE)
        if mask_ptr is not None:
            store(mask_ptr, base, valid, (kept & 1).to(tl.int8), M, P, PIECE)
        n_kept += tl.where(valid, -tl.sum(kept, axis=1), 0)
        z_kept = (z.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True).to(tl.float64)
        sparse += tl.where(valid, tl.sum(z_kept, axis=1), 0.0)
        sparse_squares += tl.where(valid, sum_of_squares(z_kept, P), 0.0)
        shifted = z.to(tl.float64)
        if SHIFT:
            shifted -= first.to(tl.float64)
        if M < P:
            shifted = tl.where(tl.arange(0, P)[None, :] < M, shifted, 0.0)
        dense += tl.where(valid, tl.sum(shifted, axis=1), 0.0)
        dense_squares += tl.where(valid, sum_of_squares(shifted, P), 0.0)
    nu = ratio_of_sums(
        tl.sum(dense, axis=0),
        tl.sum(dense_squares, axis=0),
        tl.sum(sparse, axis=0),
        tl.sum(sparse_squares, axis=0),
        hidden,
    )
    if nu_ptr is not None:
        tl.store(nu_ptr + row, nu)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, tl.sum(n_kept, axis=0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
    tl.debug_barrier()
    if (nu > 1.0) & (nu < float("inf")):
        rescale(u_ptr, eta_ptr, row, nu, hidden, False, M, KIND, ETA, PIECE, P, G)
    elif nu != 1.0:
        rescale(u_ptr, eta_ptr, row, nu, hidden, True, M, KIND, ETA, PIECE, P, G)


@triton.jit
def _channels(x_ptr, weight_ptr, eta_ptr, row, weight_row, channel, hidden, ETA: tl.constexpr, KIND: tl.constexpr):
    """Return bit patterns, z, keys (−1 beyond the token) and fills of channels [B] of a token."""
    inside = channel < hidden
    x = tl.load(x_ptr + row * hidden + channel, mask=inside, other=0)
    eta, fill = _filling(eta_ptr, row, channel, hidden, ETA, KIND)
    z = to_float(x, KIND) - eta
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + weight_row * hidden + channel, mask=inside, other=0.0)
    key = tl.where(inside, score(z, weight, weight_ptr is None and ETA == 0), -1)
    return x, z, key, fill


@triton.jit
def _filling(eta_ptr, row, channel, hidden, ETA: tl.constexpr, KIND: tl.constexpr):
    """Return η of channels [B] of a token, as fp32 and as bit pattern."""
    if ETA == 0:
        eta = 0.0
        fill = tl.full((), 0, tl.int16 if KIND < 2 else tl.int32)
    else:
        if ETA == 2:
            eta = tl.load(eta_ptr + channel, mask=channel < hidden, other=0.0)
        else:
            eta = tl.load(eta_ptr + (row if ETA == 3 else 0))
        fill = from_float(eta, KIND)
    return eta, fill


@triton.jit
def _more_bits(
    x_ptr,
    weight_ptr,
    eta_ptr,
    row,
    weight_row,
    hidden,
    found,
    k,
    ETA: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    T: tl.constexpr,
):
    """Return `next_bits` of the keys of a token; the keys of channels i and i + T are the halves of a word."""
    low = tl.arange(0, T)
    zero = found >> 31  # unknown to the compiler, so it reads again instead of keeping the keys in registers
    _, _, a, _ = _channels(x_ptr, weight_ptr, eta_ptr, row + zero, weight_row + zero, low, hidden, ETA, KIND)
    _, _, b, _ = _channels(x_ptr, weight_ptr, eta_ptr, row + zero, weight_row + zero, low + T, hidden, ETA, KIND)
    words = part_of_keys(a, found, SHIFT, BITS) | (part_of_keys(b, found, SHIFT, BITS) << 16)
    return next_bits(words, found, k, SHIFT, BITS)


@triton.jit(do_not_specialize=["N"])
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
    B: tl.constexpr,
):
    """Prune one token of at most 2·T channels per program, without groups: keep the N highest.

    First find the lowest kept key in parts, until no lower key shares them; then write B channels at a time. Each step rereads the
    token from the nearest cache.
    """
    MAGNITUDES: tl.constexpr = weight_ptr is None and ETA == 0 and KIND == 0  # 15 bits and 16 zeros, but for NaN
    row = tl.program_id(0).to(tl.int64)
    weight_row = row // rows_per_weight
    found, k = tl.full((), 0, tl.int32), hidden - N
    if MAGNITUDES:
        found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 23, 8, T)
        found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 16, 7, T)
        if found == 0x7F800000:  # infinity, or a NaN
            found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 0, 8, T)
    else:
        found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 17, 14, T)
        if k > 0:
            found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 8, 9, T)
        if k > 0:
            found, k, n = _more_bits(x_ptr, weight_ptr, eta_ptr, row, weight_row, hidden, found, k, ETA, KIND, 0, 8, T)
    room = n - k  # for keys equal to the lowest one kept, lower channels first
    first = tl.full((), 0.0, tl.float32)
    if VAR:
        first = _first(x_ptr, eta_ptr, row, hidden, ETA, KIND)
    dense, dense_squares = tl.zeros((B,), tl.float64), tl.zeros((B,), tl.float64)
    sparse, sparse_squares = tl.zeros((B,), tl.float64), tl.zeros((B,), tl.float64)
    n_kept = tl.zeros((B,), tl.int32)
    for start in range(0, hidden, B):
        channel = start + tl.arange(0, B)
        inside = channel < hidden
        x, z, key, fill = _channels(x_ptr, weight_ptr, eta_ptr, row, weight_row, channel, hidden, ETA, KIND)
        equal = (key == found).to(tl.int32)
        if k > 0:
            n_here = tl.sum(equal)
            equal = tl.where(tl.cumsum(equal, axis=0) <= room, equal, 0)
            room -= n_here
        kept = (sign(found - key) - equal) & sign(channel - hidden)
        n_kept -= kept
        eta, _ = _filling(eta_ptr, row, channel, hidden, ETA, KIND)
        passed = to_rescale(x, eta, KIND) if VAR and ETA > 0 else x
        tl.store(u_ptr + row * hidden + channel, chosen(kept, passed, fill), mask=inside)
        if mask_ptr is not None:
            tl.store(mask_ptr + row * hidden + channel, (kept & 1).to(tl.int8), mask=inside)
        if VAR:
            shifted = tl.where(inside, z.to(tl.float64) - first.to(tl.float64), 0.0)
            z_kept = (z.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True).to(tl.float64)
            dense += shifted
            dense_squares = tl.fma(shifted, shifted, dense_squares)
            sparse += z_kept
            sparse_squares = tl.fma(z_kept, z_kept, sparse_squares)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, tl.sum(n_kept).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
    if VAR:
        nu = ratio_of_sums(tl.sum(dense), tl.sum(dense_squares), tl.sum(sparse), tl.sum(sparse_squares), hidden)
        if nu_ptr is not None:
            tl.store(nu_ptr + row, nu)
        if nu != 1.0:
            tl.debug_barrier()
            for start in range(0, hidden, B):
                channel = start + tl.arange(0, B)
                u = tl.load(u_ptr + row * hidden + channel, mask=channel < hidden, other=0)
                eta, fill = _filling(eta_ptr, row, channel, hidden, ETA, KIND)
                u = rescaled(u, eta, fill, nu, KIND, True)
                tl.store(u_ptr + row * hidden + channel, u, mask=channel < hidden)


@triton.jit
def centre_kernel(x_ptr, eta_ptr, hidden, KIND: tl.constexpr, STAT: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """Write η of one token per program, fp32 [token] rounded to the dtype of x. STAT: 1 median, 2 mean."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, G)[:, None] * P + tl.arange(0, P)[None, :]
    inside = channel < hidden
    x = tl.load(x_ptr + row * hidden + channel, mask=inside, other=0)
    if STAT == 1:
        eta = median(x, inside, hidden, KIND)
    else:
        eta = mean(x, inside, hidden, KIND)
    tl.store(eta_ptr + row, eta)


@triton.jit
def packed_median_kernel(x_ptr, eta_ptr, hidden, KIND: tl.constexpr, T: tl.constexpr):
    """Write the median of one token per program, fp32 [token]; x has an even number of 16-bit channels, read as words."""
    row = tl.program_id(0).to(tl.int64)
    n_words = hidden // 2
    word = tl.arange(0, T)
    x = tl.load(x_ptr + row * n_words + word, mask=word < n_words, other=0x7FFF7FFF)  # NaN is below nothing
    middle = to_float(kth_lowest(x, (hidden - 1) // 2, True, KIND).to(tl.int16), KIND)
    has_nan = count_numbers(x, KIND) < hidden
    tl.store(eta_ptr + row, tl.where(has_nan, float("nan"), middle + 0.0))
