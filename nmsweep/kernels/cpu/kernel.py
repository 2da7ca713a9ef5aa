"""The compiled part of the CPU backend: plain loops over whole tokens that LLVM vectorises by itself.

Values are bit patterns: uint16 for bfloat16, uint32 for float32. Scores become unsigned keys, because the bit pattern of a float ≥ 0
grows with the float. Each thread takes chunks of tokens and goes through the steps of `_run` in scratch memory that stays in cache.
To rank the groups of a chunk, their channels are transposed to [m, groups], so that each loop runs over groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

LARGEST_M = 64
"""Largest group that is ranked by a sorting network."""

LANES = 64
"""Groups of a chunk are filled up to a multiple, so that vector loops have no remainder."""

POINTERS = ("call", "next_chunk", "kept", "x", "u", "scale", "gain", "wide_gain", "weight", "eta", "mask", "nu")  # fmt: skip
"""Addresses given to a kernel, in this order; null where absent."""
_CALL, _NEXT, _KEPT, _X, _U, _SCALE, _GAIN, _WIDE_GAIN, _WEIGHT, _ETA, _MASK, _NU = range(len(POINTERS))

CALL = (
    "rows", "hidden", "n", "m", "chunk_rows", "infinity", "rows_per_weight", "centre", "var", "has_scale", "gain_rows", "has_wide_gain",
    "has_mask", "has_nu",
)  # fmt: skip
"""int64 numbers of one call, in this order."""
_RECORD = np.dtype([(name, np.int64) for name in CALL])

CENTRES = ("none", "median", "mean", "channels", "tokens")
"""Where η comes from."""
_NONE, _MEDIAN, _MEAN, _OF_CHANNELS, _OF_TOKENS = range(len(CENTRES))

_EXPONENT = 0x7FF << 52  # of a float64


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile together with the caller; numba infers types, and the annotations are for the reader."""
    compiled: Callable[..., Any] = njit(function)
    return compiled


@cache
def kernel(dtype: Any, key_type: Any) -> Any:
    """Return the C function `(array of POINTERS)` for bit patterns of one dtype and keys of another, cached on disk."""

    def run(pointers: Any) -> None:
        _run(pointers, dtype, key_type)

    signature = types.void(types.CPointer(types.voidptr))
    try:
        return cfunc(signature, cache=True)(run)
    except RuntimeError:  # numba: no folder for its cache can be written
        return cfunc(signature)(run)


@intrinsic
def _fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address atomically and return the value before: threads share chunks and counts."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), codegen


@jit
def _run(pointers: Any, dtype: Any, key_type: Any) -> None:
    """Prune chunks of tokens until none is left."""
    call = carray(pointers[_CALL], (1,), _RECORD)[0]
    rows, hidden, m, chunk_rows = call.rows, call.hidden, call.m, call.chunk_rows
    shape = (rows, hidden)
    x, u = carray(pointers[_X], shape, dtype), carray(pointers[_U], shape, dtype)
    scale, gain = carray(pointers[_SCALE], (rows,), np.float32), carray(pointers[_GAIN], shape, dtype)
    wide_gain = carray(pointers[_WIDE_GAIN], (hidden,), np.float32)
    weight = carray(pointers[_WEIGHT], shape, np.float32)
    eta = carray(pointers[_ETA], (max(rows, hidden),), dtype)
    mask, nu_out = carray(pointers[_MASK], shape, np.uint8), carray(pointers[_NU], (rows,), np.float32)

    groups = chunk_rows * (hidden // m)
    filled = (groups + LANES - 1) // LANES * LANES
    channels = 4  # of a group, filled up
    while channels < m <= LARGEST_M:
        channels *= 2
    room = filled * (channels if m <= LARGEST_M else m)
    keys, keep = np.zeros((2, room), key_type), np.empty((2, room), np.uint8)
    sorting, threshold, taken = (
        np.empty((channels, filled), key_type),
        np.empty(filled, key_type),
        np.empty(filled, np.uint8),
    )
    made, ordered = np.empty((chunk_rows, hidden), dtype), np.empty(hidden, dtype)
    centre = np.zeros((chunk_rows, hidden), dtype)
    if call.centre == _OF_CHANNELS:
        for r in range(chunk_rows):
            for i in range(hidden):
                centre[r, i] = eta[i]
    nu = np.ones(chunk_rows, np.float32)

    kept, chunk = 0, _fetch_add(pointers[_NEXT], 1)
    while chunk * chunk_rows < rows:
        first, end = chunk * chunk_rows, min((chunk + 1) * chunk_rows, rows)
        count = end - first
        tokens = x[first:end]
        if call.has_scale or call.gain_rows or call.has_wide_gain:
            gains = gain[first:end] if call.gain_rows > 1 else gain[:1]
            _make(call, first, tokens, scale, gains, wide_gain, made)
            tokens = made[:count]
        if call.centre == _MEDIAN or call.centre == _MEAN or call.centre == _OF_TOKENS:
            for r in range(count):
                if call.centre == _MEDIAN:
                    value = _median(tokens, r, ordered, call.infinity)
                elif call.centre == _MEAN:
                    value = _mean(tokens, r)
                else:
                    value = eta[first + r]
                for i in range(hidden):
                    centre[r, i] = value
        key_rows = keys[0, : count * hidden].reshape(count, hidden)
        if keys.itemsize == 2:
            _magnitudes(tokens, call.infinity, key_rows)
        else:
            _scores(call, first, tokens, centre, weight, key_rows)
        if m <= LARGEST_M:
            _select_groups(keys, call.n, m, sorting, threshold, taken, keep)
        else:
            for g in range(count * (hidden // m)):
                _select_largest(keys[0, g * m : (g + 1) * m], call.n, keep[0, g * m : (g + 1) * m])
        keep_rows = keep[0, : count * hidden].reshape(count, hidden)
        if call.var:
            for r in range(count):
                nu[r] = _variance_ratio(tokens, r, centre, keep_rows)
        out = u[first:end]
        for r in range(count):
            if nu[r] == 1:
                _write(tokens, r, centre, keep_rows, out)
            else:
                _rescale(tokens, r, centre, nu[r], keep_rows, out)
            if call.has_nu:
                nu_out[first + r] = nu[r]
        if call.has_mask:
            _copy(keep_rows, mask[first:end])
        kept += _sum(keep[0, : count * hidden])
        chunk = _fetch_add(pointers[_NEXT], 1)
    _fetch_add(pointers[_KEPT], kept)


@jit
def _value(x: Any, r: int, i: int) -> Any:
    """Return the fp32 value of the bit pattern x[r, i]."""
    if x.itemsize == 2:
        return np.int32(np.int32(x[r, i]) << 16).view(np.float32)
    return np.int32(x[r, i]).view(np.float32)


@jit
def _pattern(value: Any, like: Any) -> Any:
    """Return the bit pattern of an fp32 value, rounded to nearest even in the dtype of the array `like`.

    A NaN must have no set bit in its lower half, as those that arithmetic makes of bfloat16s do; else rounding may lose it.
    """
    bits = np.float32(value).view(np.int32)
    if like.itemsize == 2:
        return np.uint16(np.int32(np.int32(bits + np.int32(0x7FFF)) + np.int32(np.int32(bits >> 16) & 1)) >> 16)
    return np.uint32(bits)


@jit
def _rounded(value: Any, like: Any) -> Any:
    """Return an fp32 value rounded as `_pattern` does."""
    pattern = _pattern(value, like)
    if like.itemsize == 2:
        return np.int32(np.int32(pattern) << 16).view(np.float32)
    return np.float32(value)


@jit
def _make(call: Any, first: int, x: Any, scale: Any, gain: Any, wide_gain: Any, made: Any) -> None:
    """Multiply tokens by scale and gain, rounding as `reference.make` does."""
    rows, hidden = x.shape
    nan = np.float32(np.nan)
    for r in range(rows):
        factor = scale[first + r] if call.has_scale else np.float32(1)
        factor = factor if factor == factor else nan
        if call.has_wide_gain:
            for i in range(hidden):
                wide = wide_gain[i]
                wide = wide if wide == wide else nan
                made[r, i] = _pattern(_value(x, r, i) * factor * wide, made)
        elif not call.gain_rows:
            for i in range(hidden):
                made[r, i] = _pattern(_value(x, r, i) * factor, made)
        elif call.gain_rows > 1 and not call.has_scale:
            for i in range(hidden):
                made[r, i] = _pattern(_value(x, r, i) * _value(gain, r, i), made)
        elif call.gain_rows > 1:
            for i in range(hidden):
                made[r, i] = _pattern(_rounded(_value(x, r, i) * factor, made) * _value(gain, r, i), made)
        else:
            for i in range(hidden):
                made[r, i] = _pattern(_rounded(_value(x, r, i) * factor, made) * _value(gain, 0, i), made)


@jit
def _copy(source: Any, target: Any) -> None:
    for r in range(source.shape[0]):
        for i in range(source.shape[1]):
            target[r, i] = source[r, i]


@jit
def _sum(flags: Any) -> Any:
    total = np.int32(0)
    for i in range(flags.size):
        total = np.int32(total + np.int32(flags[i]))
    return total


@jit
def _magnitudes(x: Any, infinity: int, keys: Any) -> None:
    """Write |x| as keys; all NaNs are equal and highest."""
    highest = np.uint16(infinity + 1)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            keys[r, i] = min(np.uint16(x[r, i] & 0x7FFF), highest)


@jit
def _scores(call: Any, first: int, x: Any, centre: Any, weight: Any, keys: Any) -> None:
    """Write |fl(fl(x − η)·w)| as keys; all NaNs are equal and highest."""
    highest = np.uint32(0x7F800001)
    for r in range(x.shape[0]):
        weights = weight[(first + r) // call.rows_per_weight]
        for i in range(x.shape[1]):
            score = np.float32((_value(x, r, i) - _value(centre, r, i)) * weights[i])
            keys[r, i] = min(np.uint32(score.view(np.uint32) & np.uint32(0x7FFFFFFF)), highest)


@jit
def _select_groups(keys: Any, n: int, m: int, sorting: Any, threshold: Any, taken: Any, keep: Any) -> None:
    """Keep the n highest keys of each m; of equals the lower channels. The flags are in keep[0]; all else is overwritten."""
    channels, groups = sorting.shape
    exponent = 0
    while 1 << exponent < m:
        exponent += 1
    steps = (exponent + 1) // 2 if channels == m else 1
    if channels == m:
        for step in range(steps):
            _deinterleave(keys[step & 1], 4 if 2 * step + 2 <= exponent else 2, keys[1 - (step & 1)])
    else:
        _transpose(keys[0], m, groups, keys[1])
    tile, flags = keys[steps & 1].reshape(channels, groups), keep[steps & 1].reshape(channels, groups)
    for c in range(m, channels):  # what fills up to a power of two comes last and ranks last
        for g in range(groups):
            tile[c, g] = 0
    _sort_halves(tile, sorting)
    _nth_of_halves(sorting, n, threshold)
    _mark(tile, threshold, n, taken, flags)
    if channels == m:
        for step in range(steps - 1, -1, -1):
            _interleave(keep[1 - (step & 1)], 4 if 2 * step + 2 <= exponent else 2, keep[step & 1])
    else:
        _transpose(keep[1], groups, m, keep[0])


@jit
def _deinterleave(source: Any, factor: int, target: Any) -> None:
    """Write every second place (every fourth), then those after them, …; times m in all, [groups, m] becomes [m, groups]."""
    size = source.size // factor
    if factor == 2:
        a, b = target[:size], target[size:]
        for i in range(size):
            a[i], b[i] = source[2 * i], source[2 * i + 1]
    else:
        a, b, c, d = target[:size], target[size : 2 * size], target[2 * size : 3 * size], target[3 * size :]
        for i in range(size):
            a[i], b[i], c[i], d[i] = source[4 * i], source[4 * i + 1], source[4 * i + 2], source[4 * i + 3]


@jit
def _interleave(source: Any, factor: int, target: Any) -> None:
    """Undo `_deinterleave`."""
    size = source.size // factor
    if factor == 2:
        a, b = source[:size], source[size:]
        for i in range(size):
            target[2 * i], target[2 * i + 1] = a[i], b[i]
    else:
        a, b, c, d = source[:size], source[size : 2 * size], source[2 * size : 3 * size], source[3 * size :]
        for i in range(size):
            target[4 * i], target[4 * i + 1], target[4 * i + 2], target[4 * i + 3] = a[i], b[i], c[i], d[i]


@jit
def _transpose(source: Any, columns: int, rows: int, target: Any) -> None:
    """Write [rows, columns] as [columns, rows]."""
    for column in range(columns):
        for row in range(rows):
            target[column * rows + row] = source[row * columns + column]


@jit
def _sort_halves(keys: Any, out: Any) -> None:
    """Sort the channels of each half of all groups, descending (8 channels: as a whole), by Batcher's odd-even merge sort."""
    channels, groups = keys.shape
    length = 8
    if channels >= 8:
        for first in range(0, channels, 8):
            _sort_8(keys[first : first + 8], out[first : first + 8])
    else:
        length = 1
        for c in range(channels):
            for g in range(groups):
                out[c, g] = keys[c, g]
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


@jit
def _ordered(a: Any, b: Any) -> Any:
    return max(a, b), min(a, b)


@jit
def _sort_8(keys: Any, out: Any) -> None:
    """Sort 8 channels of all groups, descending, without a visit to memory in between."""
    for g in range(keys.shape[1]):
        a, b = _ordered(keys[0, g], keys[1, g])
        c, d = _ordered(keys[2, g], keys[3, g])
        e, f = _ordered(keys[4, g], keys[5, g])
        p, q = _ordered(keys[6, g], keys[7, g])
        (a, c), (b, d), (e, p), (f, q) = _ordered(a, c), _ordered(b, d), _ordered(e, p), _ordered(f, q)
        (b, c), (f, p) = _ordered(b, c), _ordered(f, p)
        (a, e), (b, f), (c, p), (d, q) = _ordered(a, e), _ordered(b, f), _ordered(c, p), _ordered(d, q)
        (c, e), (d, f) = _ordered(c, e), _ordered(d, f)
        (b, c), (d, e), (f, p) = _ordered(b, c), _ordered(d, e), _ordered(f, p)
        out[0, g], out[1, g], out[2, g], out[3, g] = a, b, c, d
        out[4, g], out[5, g], out[6, g], out[7, g] = e, f, p, q


@jit
def _nth_of_halves(keys: Any, n: int, nth: Any) -> None:
    """Write the n-th largest of two sorted halves: over the ways to take n keys from their tops, the smallest of the largest left."""
    channels, groups = keys.shape
    half = channels // 2
    first, last = max(0, n - 1 - half), min(half, n - 1)
    if channels == 8:
        first, last, half = n - 1, n - 1, n
    for i in range(first, last + 1):
        j = n - 1 - i
        a, b = keys[i if i < half else half + j], keys[half + j if j < half and channels != 8 else i]
        for g in range(groups):
            nth[g] = min(nth[g], max(a[g], b[g])) if i > first else max(a[g], b[g])


@jit
def _mark(keys: Any, threshold: Any, n: int, taken: Any, keep: Any) -> None:
    """Flag keys above the threshold of their group, and of its equals as many as are missing, from the first channel on."""
    channels, groups = keys.shape
    room = np.uint8(n)
    for c in range(0, channels, 4):
        for g in range(groups):
            t = threshold[g]
            above = np.uint8(keys[c, g] > t) + np.uint8(keys[c + 1, g] > t)
            above += np.uint8(keys[c + 2, g] > t) + np.uint8(keys[c + 3, g] > t)
            taken[g] = above if c == 0 else taken[g] + above
    for c in range(0, channels, 4):
        for g in range(groups):
            t, used = threshold[g], taken[g]
            for i in range(4):
                key = keys[c + i, g]
                equal = (key == t) & (used < room)
                used = np.uint8(used + np.uint8(equal))
                keep[c + i, g] = (key > t) | equal
            taken[g] = used


@jit
def _select_largest(keys: Any, n: int, keep: Any) -> None:
    """Keep the n highest keys; of equals the lower channels."""
    threshold = _nth_largest(keys, n)
    for i in range(keys.size):
        keep[i] = keys[i] > threshold
    room = n - _sum(keep)
    i = 0
    while room > 0:
        if keys[i] == threshold:
            keep[i] = 1
            room -= 1
        i += 1


@jit
def _nth_largest(keys: Any, n: int) -> Any:
    """Return the n-th largest of unsigned keys, found bit by bit from the top."""
    kind = keys.dtype.type
    found = kind(0)
    for bit in range(8 * keys.itemsize - 1, -1, -1):
        candidate = kind(found | kind(1 << bit))
        count = _count_from(keys, candidate)
        if count >= n:
            found = candidate
            if count == n:
                return _lowest_from(keys, candidate)
    return found


@jit
def _count_from(keys: Any, bound: Any) -> int:
    """Count the keys ≥ bound."""
    kind = keys.dtype.type
    total = 0
    for start in range(0, keys.size, 32768):  # a count in 16 bits
        part = keys[start : start + 32768]
        count = kind(0)
        for i in range(part.size):
            count = kind(count + kind(part[i] >= bound))
        total += np.int64(count)
    return total


@jit
def _lowest_from(keys: Any, bound: Any) -> Any:
    """Return the lowest of the keys ≥ bound."""
    kind = keys.dtype.type
    highest = kind(-1)
    lowest = highest
    for i in range(keys.size):
        lowest = min(lowest, keys[i] if keys[i] >= bound else highest)
    return lowest


@jit
def _median(x: Any, r: int, ordered: Any, infinity: int) -> Any:
    """Return the bit pattern of the lower of the two middle values; NaN if the row has one; never −0."""
    kind, hidden = x.dtype.type, x.shape[1]
    sign, highest = kind(1 << (8 * x.itemsize - 1)), kind(infinity)
    nan = kind(0)
    for i in range(hidden):
        pattern = x[r, i]
        nan = kind(nan | kind(kind(pattern & ~sign) > highest))
        ordered[i] = kind(~pattern) if pattern & sign else kind(pattern | sign)
    if nan:
        return kind(infinity + 1 + (infinity & -infinity) // 2)
    found = _nth_largest(ordered, hidden - (hidden - 1) // 2)
    pattern = kind(found ^ sign) if found & sign else kind(~found)
    return kind(0) if pattern == sign else pattern


@jit
def _mean(x: Any, r: int) -> Any:
    """Return the bit pattern of the mean in the order-free arithmetic of `reference.token_mean`, here with integers; never −0."""
    hidden = x.shape[1]
    peak = np.int32(0)
    for i in range(hidden):
        peak = max(peak, np.int32(np.float32(_value(x, r, i)).view(np.int32) & 0x7FFFFFFF))
    mean = 0.0
    if peak >= 0x7F800000:
        for i in range(hidden):
            mean += np.float64(_value(x, r, i))
    elif peak > 0:
        power = np.int64(np.float64(np.int32(peak).view(np.float32)).view(np.int64) & np.int64(_EXPONENT)).view(
            np.float64
        )
        scale, total = 2.0**35 / power, np.int64(0)
        for i in range(hidden):
            total += np.int64(np.rint(np.float64(_value(x, r, i)) * scale))
        mean = np.float64(total) * (power * 2.0**-35)
    mean = _rounded(np.float32(mean / hidden), x)
    return _pattern(mean if mean != 0 else np.float32(0), x)


@jit
def _variance_ratio(x: Any, r: int, centre: Any, keep: Any) -> Any:
    """Return ν of one token of which at least one channel is pruned, so that Var k⊙z is 0 only if k⊙z is."""
    dense, dense_squares, sparse, sparse_squares = _sums(x, r, centre, keep)
    dense_variance = dense_squares - dense * dense / x.shape[1]
    sparse_variance = sparse_squares - sparse * sparse / x.shape[1]
    if dense_variance == 0 or sparse_variance == 0:
        return np.float32(1)
    return np.float32(np.sqrt(dense_variance / sparse_variance))


@njit(fastmath={"reassoc", "contract"})
def _sums(x: Any, r: int, centre: Any, keep: Any) -> Any:
    """Return sum and sum of squares of z less its first value, and of z where kept, in float64 and any order."""
    first = np.float64(_value(x, r, 0) - _value(centre, r, 0))
    dense, dense_squares, sparse, sparse_squares = 0.0, 0.0, 0.0, 0.0
    for i in range(x.shape[1]):
        z = np.float64(_value(x, r, i) - _value(centre, r, i))
        shifted = z - first
        kept = z if keep[r, i] else 0.0
        dense += shifted
        dense_squares += shifted * shifted
        sparse += kept
        sparse_squares += kept * kept
    return dense, dense_squares, sparse, sparse_squares


@jit
def _write(x: Any, r: int, centre: Any, keep: Any, out: Any) -> None:
    for i in range(x.shape[1]):
        value, fill = x[r, i], centre[r, i]
        out[r, i] = value if keep[r, i] else fill


@jit
def _rescale(x: Any, r: int, centre: Any, nu: Any, keep: Any, out: Any) -> None:
    more = np.float32(nu - np.float32(1))
    for i in range(x.shape[1]):
        value, fill = x[r, i], centre[r, i]
        z = _value(x, r, i) - _value(centre, r, i)
        rescaled = _pattern(_value(x, r, i) + more * z, x)
        rescaled = value if z == 0 else rescaled
        out[r, i] = rescaled if keep[r, i] else fill
