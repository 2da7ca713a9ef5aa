"""The compiled part of the CPU backend: plain loops over whole tokens, which LLVM vectorises by itself.

Values are bit patterns: uint16 for bfloat16, uint32 for float32. Scores become unsigned keys, because the bit pattern of a
float ≥ 0 grows with the float. Each thread takes chunks of tokens and does the steps of `_run` in scratch memory that stays in cache.
To rank the groups of a chunk, their channels are transposed to [channels, groups], so that each inner loop runs over groups.

Three rules keep the loops vectorised: index two-dimensional arrays instead of slicing rows (a slice costs as much as a hundred
channels), cast every result of integer arithmetic (numba widens it to 64 bits), and load both sides before a choice between them.
"""

from functools import cache

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

LARGEST_M = 64
"""Groups up to this size are ranked by a sorting network, larger ones by a search for the n-th highest key."""

LANES = 64
"""The groups of a chunk are filled up to a multiple, so that vector loops have no remainder."""

POINTERS = ("call", "next_chunk", "kept", "x", "u", "scale", "gain", "wide_gain", "weight", "eta", "mask", "nu")
"""Addresses given to a kernel, in this order; null where absent."""
_CALL, _NEXT_CHUNK, _KEPT, _X, _U, _SCALE, _GAIN, _WIDE_GAIN, _WEIGHT, _ETA, _MASK, _NU = range(len(POINTERS))

CALL = (
    "rows", "hidden", "n", "m", "chunk_rows", "rows_per_weight", "median", "var", "has_eta", "has_parts", "has_scale", "has_wide_gain",
    "has_mask", "has_nu",
)  # fmt: skip
"""int64 numbers at the first address, in this order."""
_RECORD = np.dtype([(name, np.int64) for name in CALL])


@cache
def kernel(dtype, key_type):
    """Compile the C callback `(array of POINTERS)` for bit patterns of one dtype and keys of another; cached on disk."""

    def run(pointers):
        _run(pointers, dtype, key_type)

    signature = types.void(types.CPointer(types.voidptr))
    try:
        return cfunc(signature, cache=True)(run)
    except RuntimeError:  # numba finds no folder where it can write
        return cfunc(signature)(run)


@intrinsic
def _fetch_add(typing, address, amount):
    """Add to the int64 at an address atomically and return the value before, to share chunks and counts between threads."""

    def codegen(context, builder, signature, arguments):
        place = builder.bitcast(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), codegen


@njit
def _run(pointers, dtype, key_type):
    """Prune chunks of tokens until none is left."""
    call = carray(pointers[_CALL], (1,), _RECORD)[0]
    rows, hidden, n, m, chunk_rows = call.rows, call.hidden, call.n, call.m, call.chunk_rows
    x, u = carray(pointers[_X], (rows, hidden), dtype), carray(pointers[_U], (rows, hidden), dtype)
    scale, gain = carray(pointers[_SCALE], (rows,), np.float32), carray(pointers[_GAIN], (rows, hidden), dtype)
    wide_gain = carray(pointers[_WIDE_GAIN], (hidden,), np.float32)
    weight = carray(pointers[_WEIGHT], (rows, hidden), np.float32)
    eta = carray(pointers[_ETA], (rows, hidden), dtype)
    mask, nu_out = carray(pointers[_MASK], (rows, hidden), np.uint8), carray(pointers[_NU], (rows,), np.float32)

    channels = 4 if m <= LARGEST_M else m  # of a group: filled up to a power of two
    while channels < m:
        channels *= 2
    groups = (chunk_rows * (hidden // m) + LANES - 1) // LANES * LANES
    keys, keep = np.empty((2, channels * groups), key_type), np.empty((2, channels * groups), np.uint8)
    sorting, threshold = np.empty((channels, groups), key_type), np.empty(groups, key_type)
    taken, ordered = np.empty(groups, np.uint8), np.empty(hidden, dtype)
    parts, medians = np.empty((chunk_rows, hidden), dtype), np.zeros((chunk_rows, hidden), dtype)
    nu = np.ones(chunk_rows, np.float32)

    kept, chunk = 0, _fetch_add(pointers[_NEXT_CHUNK], 1)
    while chunk * chunk_rows < rows:
        first, end = chunk * chunk_rows, min((chunk + 1) * chunk_rows, rows)
        count = end - first
        tokens = x[first:end]
        if call.has_parts:
            _make(call, tokens, scale[first:end], gain if call.has_scale else gain[first:end], wide_gain, parts)
            tokens = parts[:count]
        if call.median:
            _medians(tokens, ordered, medians)
        centre = eta[first:end] if call.has_eta else medians
        token_keys = keys[0, : count * hidden].reshape(count, hidden)
        if keys.itemsize == 2:
            _magnitudes(tokens, token_keys)
        else:
            _scores(call, first, tokens, centre, weight, token_keys)
        if m <= LARGEST_M:
            _select_groups(keys, n, m, sorting, threshold, taken, keep)
        else:
            for start in range(0, count * hidden, m):
                _select_largest(keys[0, start : start + m], n, keep[0, start : start + m])
        token_keep = keep[0, : count * hidden].reshape(count, hidden)
        if call.var:
            _variance_ratios(tokens, centre, token_keep, nu)
        _write(tokens, centre, nu, token_keep, u[first:end])
        for r in range(count if call.has_nu else 0):
            nu_out[first + r] = nu[r]
        for r in range(count if call.has_mask else 0):
            for i in range(hidden):
                mask[first + r, i] = token_keep[r, i]
        kept += _sum(keep[0, : count * hidden])
        chunk = _fetch_add(pointers[_NEXT_CHUNK], 1)
    _fetch_add(pointers[_KEPT], kept)


@njit
def _value(x, r, i):
    """Return the fp32 value of the bit pattern x[r, i]."""
    if x.itemsize == 2:
        return np.int32(np.int32(x[r, i]) << 16).view(np.float32)
    return np.int32(x[r, i]).view(np.float32)


@njit
def _rounded(value, like):
    """Return the bits, as int32, of an fp32 value rounded to nearest even in the dtype of the array `like`.

    A NaN stays one if the lower half of its bits is 0, as it is in those that arithmetic makes of bfloat16s.
    """
    bits = np.float32(value).view(np.int32)
    if like.itemsize == 2:
        return np.int32(np.int32(np.int32(bits + 0x7FFF) + np.int32(np.int32(bits >> 16) & 1)) & -65536)
    return bits


@njit
def _pattern(value, like):
    """Return the bit pattern of an fp32 value rounded to the dtype of the array `like`."""
    if like.itemsize == 2:
        return np.uint16(_rounded(value, like) >> 16)
    return np.uint32(_rounded(value, like))


@njit
def _make(call, x, scale, gain, wide_gain, out):
    """Multiply tokens by scale and gain, with the roundings of `reference.make`."""
    nan = np.float32(np.nan)
    for r in range(x.shape[0]):
        if not call.has_scale:
            for i in range(x.shape[1]):
                out[r, i] = _pattern(_value(x, r, i) * _value(gain, r, i), out)
            continue
        factor = scale[r] if scale[r] == scale[r] else nan
        if call.has_wide_gain:
            for i in range(x.shape[1]):
                wide = wide_gain[i] if wide_gain[i] == wide_gain[i] else nan
                out[r, i] = _pattern(_value(x, r, i) * factor * wide, out)
        else:
            for i in range(x.shape[1]):
                scaled = np.int32(_rounded(_value(x, r, i) * factor, out)).view(np.float32)
                out[r, i] = _pattern(scaled * _value(gain, 0, i), out)


@njit
def _medians(x, ordered, medians):
    """Write the bit pattern of each token's median, the lower of the two middle values, for all its channels; NaN if one is; never −0."""
    kind, hidden = x.dtype.type, x.shape[1]
    sign, infinity, nan = (0x8000, 0x7F80, 0x7FC0) if x.itemsize == 2 else (0x80000000, 0x7F800000, 0x7FC00000)
    sign, highest = kind(sign), kind(infinity)
    for r in range(x.shape[0]):
        has_nan = kind(0)
        for i in range(hidden):
            pattern = x[r, i]
            has_nan = kind(has_nan | kind(kind(pattern & ~sign) > highest))
            ordered[i] = kind(~pattern) if pattern & sign else kind(pattern | sign)
        found = _nth_largest(ordered, hidden - (hidden - 1) // 2)
        pattern = kind(found ^ sign) if found & sign else kind(~found)
        median = kind(nan) if has_nan else kind(0) if pattern == sign else pattern
        for i in range(hidden):
            medians[r, i] = median


@njit
def _magnitudes(x, keys):
    """Write |x| of bfloat16s as keys; all NaNs are equal and highest."""
    highest = np.uint16(0x7F81)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            keys[r, i] = min(np.uint16(x[r, i] & 0x7FFF), highest)


@njit
def _scores(call, first, x, centre, weight, keys):
    """Write |fl(fl(x − η)·w)| as keys; all NaNs are equal and highest."""
    highest = np.uint32(0x7F800001)
    for r in range(x.shape[0]):
        row = (first + r) // call.rows_per_weight
        for i in range(x.shape[1]):
            score = np.float32((_value(x, r, i) - _value(centre, r, i)) * weight[row, i])
            keys[r, i] = min(np.uint32(score.view(np.uint32) & np.uint32(0x7FFFFFFF)), highest)


@njit
def _select_groups(keys, n, m, sorting, threshold, taken, keep):
    """Keep the n highest keys of each m, of equals the lower channels. Keys are in keys[0], flags in keep[0]; the rest is scratch."""
    channels, groups = sorting.shape
    size, steps, left, factors = m * groups, 0, m, np.empty(7, np.int64)
    while left > 1:
        factors[steps] = 4 if left % 4 == 0 else 2 if left % 2 == 0 else left
        _deinterleave(keys[steps & 1, :size], factors[steps], keys[1 - (steps & 1), :size])
        left //= factors[steps]
        steps += 1
    tile, flags = keys[steps & 1].reshape(channels, groups), keep[steps & 1].reshape(channels, groups)
    for c in range(m, channels):  # what fills up to a power of two comes last and is 0, so it ranks last
        for g in range(groups):
            tile[c, g] = 0
    _sort_halves(tile, sorting)
    _nth_of_halves(sorting, n, threshold)
    _mark(tile, threshold, n, taken, flags)
    for step in range(steps - 1, -1, -1):
        _interleave(keep[1 - (step & 1), :size], factors[step], keep[step & 1, :size])


@njit
def _deinterleave(source, factor, target):
    """Write each factor-th element from 0 on, then each from 1 on, …; over all factors of m, [groups, m] becomes [m, groups]."""
    size = source.size // factor
    if factor == 4:  # with the factor written out, LLVM knows the stride
        a, b, c, d = target[:size], target[size : 2 * size], target[2 * size : 3 * size], target[3 * size :]
        for i in range(size):
            a[i], b[i], c[i], d[i] = source[4 * i], source[4 * i + 1], source[4 * i + 2], source[4 * i + 3]
    elif factor == 2:
        a, b = target[:size], target[size:]
        for i in range(size):
            a[i], b[i] = source[2 * i], source[2 * i + 1]
    else:
        for k in range(factor):
            for i in range(size):
                target[k * size + i] = source[factor * i + k]


@njit
def _interleave(source, factor, target):
    """Undo `_deinterleave`."""
    size = source.size // factor
    if factor == 4:
        a, b, c, d = source[:size], source[size : 2 * size], source[2 * size : 3 * size], source[3 * size :]
        for i in range(size):
            target[4 * i], target[4 * i + 1], target[4 * i + 2], target[4 * i + 3] = a[i], b[i], c[i], d[i]
    elif factor == 2:
        a, b = source[:size], source[size:]
        for i in range(size):
            target[2 * i], target[2 * i + 1] = a[i], b[i]
    else:
        for k in range(factor):
            for i in range(size):
                target[factor * i + k] = source[k * size + i]


@njit
def _ordered(a, b):
    return max(a, b), min(a, b)


@njit
def _sort_halves(keys, out):
    """Sort the channels of each half of all groups, descending (8 channels as a whole), by Batcher's odd-even merge sort."""
    channels, groups = keys.shape
    length = 8 if channels >= 8 else 2
    for first in range(0, channels, length):
        if length == 8:
            _sort_8(keys, first, out)
        else:
            for g in range(groups):
                out[first, g], out[first + 1, g] = _ordered(keys[first, g], keys[first + 1, g])
    while length < channels // 2:
        step = length
        while step > 0:
            for start in range(step % length, channels - step, 2 * step):
                for c in range(start, min(start + step, channels - step)):
                    if c // (2 * length) == (c + step) // (2 * length):
                        for g in range(groups):
                            out[c, g], out[c + step, g] = _ordered(out[c, g], out[c + step, g])
            step //= 2
        length *= 2


@njit
def _sort_8(keys, first, out):
    """Sort 8 channels of all groups, descending, by Batcher's network with all keys in registers."""
    k, o = keys[first : first + 8], out[first : first + 8]
    for i in range(keys.shape[1]):
        (a, b), (c, d) = _ordered(k[0, i], k[1, i]), _ordered(k[2, i], k[3, i])
        (e, f), (g, h) = _ordered(k[4, i], k[5, i]), _ordered(k[6, i], k[7, i])
        (a, c), (b, d), (e, g), (f, h) = _ordered(a, c), _ordered(b, d), _ordered(e, g), _ordered(f, h)
        (b, c), (f, g) = _ordered(b, c), _ordered(f, g)
        (a, e), (b, f), (c, g), (d, h) = _ordered(a, e), _ordered(b, f), _ordered(c, g), _ordered(d, h)
        (c, e), (d, f) = _ordered(c, e), _ordered(d, f)
        (b, c), (d, e), (f, g) = _ordered(b, c), _ordered(d, e), _ordered(f, g)
        o[0, i], o[1, i], o[2, i], o[3, i], o[4, i], o[5, i], o[6, i], o[7, i] = a, b, c, d, e, f, g, h


@njit
def _nth_of_halves(keys, n, nth):
    """Write the n-th largest of two sorted halves: over the ways to take n − 1 keys from their tops, the least of the largest left."""
    channels, groups = keys.shape
    half = channels // 2 if channels != 8 else channels
    first, last = max(0, n - 1 - half), min(half, n - 1)
    if channels == 8:
        first = last
    for i in range(first, last + 1):
        j = n - 1 - i
        a, b = i if i < half else half + j, half + j if j < half < channels else i
        for g in range(groups):
            larger = max(keys[a, g], keys[b, g])
            nth[g] = min(nth[g], larger) if i > first else larger


@njit
def _mark(keys, threshold, n, taken, keep):
    """Flag keys above the threshold of their group, and of its equals as many as are missing, from the first channel on."""
    channels, groups = keys.shape
    room = np.uint8(n)
    for c in range(0, channels, 4):
        for g in range(groups):
            limit, above = threshold[g], taken[g] if c > 0 else np.uint8(0)
            for i in range(4):
                above = np.uint8(above + np.uint8(keys[c + i, g] > limit))
            taken[g] = above
    for c in range(0, channels, 4):
        for g in range(groups):
            limit, count = threshold[g], taken[g]
            for i in range(4):
                key = keys[c + i, g]
                equal = (key == limit) & (count < room)
                count = np.uint8(count + np.uint8(equal))
                keep[c + i, g] = (key > limit) | equal
            taken[g] = count


@njit
def _select_largest(keys, n, keep):
    """Keep the n highest keys, of equals the lower channels."""
    threshold = _nth_largest(keys, n)
    for i in range(keys.size):
        keep[i] = keys[i] > threshold
    room, i = n - _sum(keep), 0
    while room > 0:
        if keys[i] == threshold:
            keep[i] = 1
            room -= 1
        i += 1


@njit
def _nth_largest(keys, n):
    """Return the n-th largest of unsigned keys, found bit by bit from the top until exactly n are left."""
    kind, bit = keys.dtype.type, 8 * keys.itemsize
    found, count = kind(0), keys.size
    while bit > 0 and count != n:
        bit -= 1
        candidate = kind(found | kind(1 << bit))
        above = _count_from(keys, candidate)
        if above >= n:
            found, count = candidate, above
    return _lowest_from(keys, found)


@njit
def _lowest_from(keys, bound):
    """Return the lowest of the keys ≥ bound."""
    highest = keys.dtype.type(-1)
    lowest = highest
    for i in range(keys.size):
        key = keys[i]
        lowest = min(lowest, key if key >= bound else highest)
    return lowest


@njit
def _count_from(keys, bound):
    """Count the keys ≥ bound."""
    kind, total = keys.dtype.type, np.int64(0)
    for start in range(0, keys.size, 32768):  # a count in as many bits as a key has
        part = keys[start : start + 32768]
        count = kind(0)
        for i in range(part.size):
            count = kind(count + kind(part[i] >= bound))
        total += np.int64(count)
    return total


@njit
def _sum(flags):
    total = np.int32(0)
    for i in range(flags.size):
        total = np.int32(total + np.int32(flags[i]))
    return total


@njit
def _variance_ratios(x, centre, keep, nu):
    """Write ν of tokens of which at least one channel is pruned, so that Var k⊙z is 0 only if k⊙z is."""
    hidden = x.shape[1]
    for r in range(x.shape[0]):
        dense, dense_squares, sparse, sparse_squares = _sums(x, r, centre, keep)
        dense_variance = dense_squares - dense * dense / hidden
        sparse_variance = sparse_squares - sparse * sparse / hidden
        constant = dense_variance == 0 or sparse_variance == 0
        nu[r] = np.float32(1) if constant else np.float32(np.sqrt(dense_variance / sparse_variance))


@njit(fastmath={"reassoc", "contract"})
def _sums(x, r, centre, keep):
    """Return sum and sum of squares of z less its first value, and of z where kept, in float64 and in any order."""
    first = np.float64(_value(x, r, 0) - _value(centre, r, 0))
    dense, dense_squares, sparse, sparse_squares = 0.0, 0.0, 0.0, 0.0
    for i in range(x.shape[1]):
        z = np.float64(_value(x, r, i) - _value(centre, r, i))
        shifted, kept = z - first, z if keep[r, i] else 0.0
        dense += shifted
        dense_squares += shifted * shifted
        sparse += kept
        sparse_squares += kept * kept
    return dense, dense_squares, sparse, sparse_squares


@njit
def _write(x, centre, nu, keep, out):
    """Write η where pruned and x + (ν − 1)·z where kept; x itself where ν is 1 or z is 0."""
    for r in range(x.shape[0]):
        more = np.float32(nu[r] - np.float32(1))
        if nu[r] == 1:
            for i in range(x.shape[1]):
                value, fill = x[r, i], centre[r, i]
                out[r, i] = value if keep[r, i] else fill
        else:
            for i in range(x.shape[1]):
                value, fill = x[r, i], centre[r, i]
                z = _value(x, r, i) - _value(centre, r, i)
                rescaled = _pattern(_value(x, r, i) + more * z, x)
                rescaled = value if z == 0 else rescaled
                out[r, i] = rescaled if keep[r, i] else fill
