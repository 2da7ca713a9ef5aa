"""The bodies that the threads of the cpu backend run, compiled by numba: whole tokens, or one stream of blocks.

Bit patterns are arrays of uint16 for bfloat16, int16 for float16 and uint32 for float32, so the compiler specialises by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from nmsweep.kernels.cpu.lanes import (
    OCTETS,
    as_words,
    at,
    call_blocks,
    comes_in_pairs,
    fetch_add,
    float_bits,
    from_float,
    in_order,
    jit,
    jit_any_order,
    jit_in_place,
    kept_of_two,
    kth_of_16,
    kth_of_32,
    pointer,
    prefetch,
    to_float,
    two_floats,
    two_patterns,
)

_EXPONENT = 0x7FF << 52  # of a float64


@jit
def plain(p: Any, storage: Any, stamp: int) -> None:
    """Keep by magnitude: x and u as one stream of blocks; the last one goes through padded scratch."""
    call = carray(p, 1)[0]
    shared = carray(p, 1).ctypes.data
    itemsize = np.empty(0, storage).itemsize
    width = call.block
    n_blocks = call.total // width
    x = carray(pointer(call.x), (call.total,), storage)
    u = carray(pointer(call.u), (call.total,), storage)
    made = np.empty(call.chunk * width if call.made != 0 else 0, storage)
    kept = 0
    while True:
        chunk = fetch_add(shared, 1)
        if chunk >= call.n_chunks:
            break
        first = chunk * call.chunk
        offset = first * width * itemsize
        source = call.x + offset
        if call.made != 0:
            _make(call, x, first * width, min((first + call.chunk) * width, call.total), made)
            source = made.ctypes.data
        kept += call_blocks(call.select, source, 0, call.u + offset, min(call.chunk, n_blocks - first))
        rest = call.total - n_blocks * width
        if chunk == call.n_chunks - 1 and rest > 0:
            last = made[(n_blocks - first) * width :] if call.made != 0 else x[call.total - rest :]
            scratch = np.zeros(width, storage)
            for i in range(rest):
                scratch[i] = last[i]
            kept += call_blocks(call.select, scratch.ctypes.data, 0, scratch.ctypes.data, 1)
            kept -= call.n * ((width - rest) // call.m)  # the groups of the padding
            for i in range(rest):
                u[call.total - rest + i] = scratch[i]
    fetch_add(shared + 8, kept)


def layout(hidden: int, m: int, padded_m: int, block: int, chunk: int, key_size: int, size: int) -> Any:
    """Where in a thread's scratch each array of `general` begins, in bytes, and where the last one ends: all after whole vectors."""
    vector = OCTETS
    room = (chunk * (hidden // m) * padded_m + block - 1) // block * block
    at_short = (room * key_size + vector - 1) // vector * vector
    at_masks = at_short + (room * 2 + block // 8 + vector - 1) // vector * vector  # and the bitmap of one block
    at_made = at_masks + (room * size + vector - 1) // vector * vector
    at_eta = at_made + (chunk * hidden * size + vector - 1) // vector * vector
    at_nu = at_eta + (chunk * size + vector - 1) // vector * vector
    at_ordered = at_nu + (chunk * 4 + vector - 1) // vector * vector
    at_halves = at_ordered + (hidden * size + 2 * vector - 1) // vector * vector
    at_octets = at_halves + (hidden * 2 + 2 * vector) // vector * vector
    at_candidates = at_octets + (hidden + 2 * vector) // vector * vector
    end = at_candidates + (m * key_size + 2 * vector - 1) // vector * vector
    return room, at_short, at_masks, at_made, at_eta, at_nu, at_ordered, at_halves, at_octets, at_candidates, end


_layout = jit(layout)


@jit
def general(p: Any, storage: Any, unsigned: Any, key_type: Any, stamp: int) -> None:
    """Any call: chunks of whole tokens through scratch."""
    call = carray(p, 1)[0]
    shared = carray(p, 1).ctypes.data
    hidden = call.hidden
    x = carray(pointer(call.x), (call.total, hidden), storage)
    u = carray(pointer(call.u), (call.total, hidden), storage)
    mask_out = carray(pointer(call.mask), (call.total, hidden), np.uint8)
    nu_out = carray(pointer(call.nu), (call.total,), np.float32)
    key_size, size = np.empty(0, key_type).itemsize, np.empty(0, storage).itemsize
    room, at_short, at_masks, at_made, at_eta, at_nu, at_ordered, at_halves, at_octets, at_candidates, end = _layout(
        hidden, call.m, call.padded_m, call.block, call.chunk, key_size, size
    )
    base = (
        call.scratch + fetch_add(shared + 16, 1) * end
    )  # memory of this thread, without an owner that is counted at each use
    keys = carray(pointer(base), (room,), key_type)  # of padded groups for the network, dense for the threshold
    short = carray(pointer(base + at_short), (room,), np.int16)
    masks = carray(pointer(base + at_masks), (room,), unsigned)
    made = carray(pointer(base + at_made), (call.chunk, hidden), storage)
    token_eta = carray(pointer(base + at_eta), (call.chunk,), storage)
    token_nu = carray(pointer(base + at_nu), (call.chunk,), np.float32)
    ordered = carray(pointer(base + at_ordered), (hidden + 1,), unsigned)
    halves = carray(pointer(base + at_halves), ((at_octets - at_halves) // 2,), np.uint16)
    octets = carray(pointer(base + at_octets), (at_candidates - at_octets,), np.uint8)
    candidates = carray(pointer(base + at_candidates), (call.m + 1,), key_type)
    eta = carray(pointer(call.eta), (hidden if call.eta_step != 0 else 1,), np.float32)
    patterns = carray(pointer(call.eta_bits), (eta.size,), storage)
    _set(token_eta, patterns[0] if call.eta != 0 else patterns.dtype.type(0))
    _set(token_nu, np.float32(1))
    kept = 0
    chunk = fetch_add(shared, 1)
    while chunk < call.n_chunks:
        first = chunk * call.chunk
        chunk = fetch_add(shared, 1)
        ahead = (min(chunk, call.n_chunks - 1) * call.chunk - first) * hidden * size  # to the next chunk, in bytes
        rows = min(call.chunk, call.total - first)
        tokens = x[first : first + rows]
        if call.made != 0:
            _make(call, x.reshape(-1), first * hidden, (first + rows) * hidden, made.reshape(-1))
            tokens = made
        for r in range(rows):
            row, row_keys = tokens[r], keys[r * hidden : (r + 1) * hidden]
            offset = (first + r) * hidden * size
            prefetch(call.u + offset, hidden * size, 1)
            prefetch(call.x + offset + ahead, hidden * size, 0)
            if call.gain_step != 0:
                prefetch(call.gain + offset + ahead, hidden * size, 0)
            if call.centre != 0:
                token_eta[r] = _median(row, ordered, halves, octets, call.infinity) if call.centre == 1 else _mean(row)
            if call.eta_step != 0:
                _keys_of_row(call, first + r, row, eta, row_keys)
            else:
                _keys_of_row(call, first + r, row, to_float(token_eta[r]), row_keys)
        kept += _select(call, rows * (hidden // call.m), keys, short, masks, candidates, halves, octets)
        if (
            call.var != 0
        ):  # in a loop of its own: the processor adds up the next row while it still divides for this one
            for r in range(rows):
                row_mask = masks[r * hidden : (r + 1) * hidden]
                if call.eta_step != 0:
                    token_nu[r] = _variance_ratio(tokens[r], eta, row_mask)
                else:
                    token_nu[r] = _variance_ratio(tokens[r], to_float(token_eta[r]), row_mask)
        for r in range(rows):
            row_mask = masks[r * hidden : (r + 1) * hidden]
            if call.eta_step != 0:
                _finish(tokens[r], eta, patterns, token_nu[r], row_mask, u[first + r])
            else:
                _finish(tokens[r], to_float(token_eta[r]), token_eta[r], token_nu[r], row_mask, u[first + r])
            if call.nu != 0:
                nu_out[first + r] = token_nu[r]
            if call.mask != 0:
                _write_mask(row_mask, mask_out[first + r])
    fetch_add(shared + 8, kept)


@jit
def _make(call: Any, x: Any, begin: int, end: int, made: Any) -> None:
    """Make the values `begin` to `end` of the stream of all tokens of their parts. No loop reads what it writes, or it would be a slow one."""
    hidden, first = call.hidden, begin
    scales = carray(pointer(call.scale), (x.size // hidden,), np.float32)
    gains = carray(pointer(call.gain), (x.size if call.gain_step != 0 else hidden,), x.dtype)
    wide_gains = carray(pointer(call.wide_gain), (hidden,), np.float32)
    while begin < end:
        row = begin // hidden
        stop, channel = min(end, (row + 1) * hidden), begin - row * hidden
        values, out = x[begin:stop], made[begin - first : stop - first]
        scale = scales[row] if call.scale != 0 else np.float32(1)
        pairs = comes_in_pairs(values) and hidden % 2 == 0 and scale == scale
        if call.wide_gain != 0:
            _scale_wide(values, scale, wide_gains[channel:], out)
        elif call.gain == 0:
            _scale(values, scale, out)
        else:
            factors = gains[begin:stop] if call.gain_step != 0 else gains[channel : channel + stop - begin]
            if pairs:
                _multiply_pairs(as_words(values), scale, call.scale != 0, as_words(factors), as_words(out))
            elif call.scale != 0:
                _scale_and_multiply(values, scale, factors, out)
            else:
                _multiply(values, factors, out)
        begin = stop


@jit
def _scale_wide(x: Any, scale: Any, gain: Any, made: Any) -> None:
    for i in range(made.size):
        made[i] = from_float((to_float(x[i]) * scale) * gain[i], made)


@jit
def _scale(x: Any, scale: Any, made: Any) -> None:
    for i in range(made.size):
        made[i] = from_float(to_float(x[i]) * scale, made)


@jit
def _multiply(x: Any, gain: Any, made: Any) -> None:
    for i in range(made.size):
        made[i] = from_float(to_float(x[i]) * to_float(gain[i]), made)


@jit
def _multiply_pairs(x: Any, scale: Any, scaled: bool, gain: Any, made: Any) -> None:
    """`_scale_and_multiply`, or `_multiply`, with a scale that is not NaN: of a product of bfloat16s a NaN has no lower half."""
    if scaled:
        for i in range(made.size):
            low, high = two_floats(x[i])
            low, high = two_floats(two_patterns(low * scale, high * scale))
            low_gain, high_gain = two_floats(gain[i])
            made[i] = two_patterns(low * low_gain, high * high_gain)
    else:
        for i in range(made.size):
            low, high = two_floats(x[i])
            low_gain, high_gain = two_floats(gain[i])
            made[i] = two_patterns(low * low_gain, high * high_gain)


@jit
def _scale_and_multiply(x: Any, scale: Any, gain: Any, made: Any) -> None:
    for i in range(made.size):
        scaled = to_float(from_float(to_float(x[i]) * scale, made))
        made[i] = from_float(scaled * to_float(gain[i]), made)


@jit_in_place
def _keys_of_row(call: Any, number: int, row: Any, eta: Any, keys: Any) -> None:
    """Keys of one token, by its number; η is one number or one for each channel."""
    if keys.itemsize == 2:
        _magnitudes(row, call.infinity + 1, keys)
    elif call.weight != 0:
        start = number // call.rows_per_weight * row.size
        _scores(row, eta, carray(pointer(call.weight + 4 * start), (row.size,), np.float32), keys)
    else:
        _scores(row, eta, np.float32(1), keys)


@jit
def _select(
    call: Any, n_groups: int, keys: Any, short: Any, masks: Any, candidates: Any, halves: Any, octets: Any
) -> Any:
    """Masks of groups of keys: by the network compiled for them, or without one by the value of the n-th highest. How many are kept."""
    m, padded_m = call.m, call.padded_m
    if call.select == 0:
        kept = 0
        for group in range(n_groups):
            start, end = group * m, (group + 1) * m
            kept += _threshold(keys[start:end], call.n, candidates, halves, octets, masks[start:end])
        return kept
    if padded_m != m:
        _spread(keys, n_groups, m, padded_m)
    blocks = (n_groups * padded_m + call.block - 1) // call.block
    if keys.itemsize == 4:
        _shorten(keys[: n_groups * padded_m], short)
    kept = call_blocks(call.select, keys.ctypes.data, short.ctypes.data, masks.ctypes.data, blocks)
    if padded_m != m:
        _gather(masks, n_groups, m, padded_m)
    return kept - call.n * (blocks * call.block // padded_m - n_groups)  # the groups of the padding


@jit_in_place
def _finish(row: Any, eta: Any, fill: Any, nu: Any, mask: Any, out: Any) -> None:
    """Write one token pruned, with η and its bit pattern one number or one for each channel."""
    if nu == np.float32(1):
        _write(row, mask, fill, out)
    elif comes_in_pairs(row) and 1 < nu < np.inf:
        _rescale_pairs(as_words(row), as_words(mask), eta, fill, nu, as_words(out))
    else:
        _rescale(row, mask, eta, fill, nu, out)


@jit
def _set(values: Any, value: Any) -> None:
    """A loop: numba takes seconds to compile the assignment to a slice."""
    for i in range(values.size):
        values[i] = value


@jit
def _magnitudes(row: Any, nan: Any, keys: Any) -> None:
    """16-bit keys: |x|, every NaN the same."""
    highest = np.uint16(nan)
    for i in range(row.size):
        key = np.uint16(row[i] & 0x7FFF)
        keys[i] = key if key < highest else highest


@jit
def _scores(row: Any, eta: Any, weight: Any, keys: Any) -> None:
    """32-bit keys: |fl(fl(x − η)·w)|, every NaN the same."""
    highest = np.int32(0x7F800001)
    for i in range(row.size):
        key = np.int32(float_bits((to_float(row[i]) - at(eta, i)) * at(weight, i)) & 0x7FFFFFFF)
        keys[i] = key if key < highest else highest


@jit
def _shorten(keys: Any, short: Any) -> None:
    """16-bit keys in the order of 32-bit ones, which are −1 or the bits of a float ≥ 0: its exponent and the top of its fraction."""
    for i in range(keys.size):
        short[i] = (np.int32(keys[i]) >> np.int32(15)) - np.int32(0x7FFF)


@jit
def _threshold(keys: Any, n: int, candidates: Any, halves: Any, octets: Any, masks: Any) -> Any:
    """Masks of the n highest keys, by the value of the n-th; of its equals the lower channels are kept. How many are kept."""
    m = keys.size
    for i in range(m):
        candidates[i] = keys[i]
    if candidates.itemsize == 2:
        threshold = candidates.dtype.type(kth_of_16(candidates, m, m - n, octets))
    else:
        threshold = candidates.dtype.type(kth_of_32(candidates, m, m - n, halves, octets))
    above, equal = np.int32(0), np.int32(0)
    for i in range(m):
        above += np.int32(keys[i] > threshold)
        equal += np.int32(keys[i] == threshold)
    last = m
    if above + equal > n:
        room = n - above
        start = 0
        while True:
            found = np.int32(0)
            for i in range(start, min(start + 64, m)):
                found += np.int32(keys[i] == threshold)
            if found >= room:
                break
            room -= found
            start += 64
        last = start
        while room > 0:
            room -= keys[last] == threshold
            last += 1
    kept = np.int32(0)
    for i in range(last):
        kept += np.int32(keys[i] >= threshold)
        masks[i] = -np.int32(keys[i] >= threshold)
    for i in range(last, m):
        kept += np.int32(keys[i] > threshold)
        masks[i] = -np.int32(keys[i] > threshold)
    return kept


@jit
def _spread(keys: Any, n_groups: int, m: int, padded_m: int) -> None:
    """Move groups of m apart, in place, from the last on; the gaps get keys below every other."""
    for group in range(n_groups - 1, -1, -1):
        for c in range(m, padded_m):
            keys[group * padded_m + c] = -1
        for c in range(m - 1, -1, -1):
            keys[group * padded_m + c] = keys[group * m + c]


@jit
def _gather(masks: Any, n_groups: int, m: int, padded_m: int) -> None:
    """Undo _spread."""
    for group in range(n_groups):
        for c in range(m):
            masks[group * m + c] = masks[group * padded_m + c]


@jit
def _write(row: Any, mask: Any, fill: Any, out: Any) -> None:
    for i in range(row.size):
        out[i] = (row[i] & mask[i]) | (at(fill, i) & ~mask[i])


@jit
def _rescale(row: Any, mask: Any, eta: Any, fill: Any, nu: Any, out: Any) -> None:
    more = nu - np.float32(1)
    for i in range(row.size):
        value = to_float(row[i])
        z = value - at(eta, i)
        rescaled = row[i] if z == 0 else from_float(value + more * z, row)
        out[i] = (rescaled & mask[i]) | (at(fill, i) & ~mask[i])


@jit
def _rescale_pairs(row: Any, mask: Any, eta: Any, fill: Any, nu: Any, out: Any) -> None:
    """`_rescale` with a finite ν, as only tokens without NaN and inf have, above 1, so that the product of 0 keeps its sign."""
    more = nu - np.float32(1)
    for i in range(row.size):
        low, high = two_floats(row[i])
        low += more * (low - at(eta, 2 * i))
        high += more * (high - at(eta, 2 * i + 1))
        filled = np.uint32(at(fill, 2 * i)) | (np.uint32(at(fill, 2 * i + 1)) << np.uint32(16))
        out[i] = (two_patterns(low, high) & mask[i]) | (filled & ~mask[i])


@jit
def _write_mask(mask: Any, out: Any) -> None:
    for i in range(mask.size):
        out[i] = mask[i] & 1


@jit
def _median(row: Any, ordered: Any, halves: Any, octets: Any, infinity: int) -> Any:
    """Bit pattern of the lower of the two middle values; NaN if one is in the row; never −0."""
    bits = 8 * ordered.itemsize
    sign, full = 1 << (bits - 1), (1 << bits) - 1
    low = high = in_order(row[0], ordered)
    for i in range(row.size):
        value = in_order(row[i], ordered)
        ordered[i] = value
        low = min(low, value)
        high = max(high, value)
    if high > sign + infinity or low < full - infinity - sign:
        return row.dtype.type(infinity + 1 + (infinity & -infinity) // 2)
    k = (row.size - 1) // 2
    found = kth_of_16(ordered, row.size, k, octets) if bits == 16 else kth_of_32(ordered, row.size, k, halves, octets)
    pattern = found ^ sign if found & sign else found ^ full
    return row.dtype.type(0 if pattern == sign else pattern)


@jit
def _mean(row: Any) -> Any:
    """Bit pattern of the mean in the order-free arithmetic of reference.token_mean, here with integers; never −0."""
    peak = np.int32(0)
    for i in range(row.size):
        magnitude = np.int32(float_bits(to_float(row[i])) & 0x7FFFFFFF)
        peak = magnitude if magnitude > peak else peak
    if peak >= np.int32(0x7F800000):
        mean = 0.0
        for i in range(row.size):
            mean += np.float64(to_float(row[i]))
    elif peak == 0:
        mean = 0.0
    else:
        exponent = np.float64(to_float(np.uint32(peak))).view(np.int64) & np.int64(_EXPONENT)
        power = np.int64(exponent).view(np.float64)
        scale = 2.0**35 / power
        total = np.int64(0)
        for i in range(row.size):
            total += np.int64(np.rint(np.float64(to_float(row[i])) * scale))
        mean = np.float64(total) * (power * 2.0**-35)
    pattern = from_float(np.float32(mean / row.size), row)
    return row.dtype.type(0) if to_float(pattern) == np.float32(0) else pattern


@jit_in_place
def _variance_ratio(row: Any, eta: Any, mask: Any) -> Any:
    """ν of one token of which at least one channel is pruned, so that Var k⊙z is 0 only if k⊙z is."""
    if comes_in_pairs(row):
        dense, dense_squares, sparse, sparse_squares = _sums_of_pairs(as_words(row), eta, as_words(mask))
        share = np.float32(1) / np.float32(row.size)
        dense_variance = dense_squares - dense * dense * share
        sparse_variance = sparse_squares - sparse * sparse * share
        if _is_sound(dense_variance, dense_squares) and _is_sound(sparse_variance, sparse_squares):
            return np.sqrt(dense_variance / sparse_variance)
    dense, dense_squares, sparse, sparse_squares = _sums(row, eta, mask)
    dense_variance = dense_squares - dense * dense / row.size
    sparse_variance = sparse_squares - sparse * sparse / row.size
    if dense_variance == 0 or sparse_variance == 0:
        return np.float32(1)
    return np.float32(np.sqrt(dense_variance / sparse_variance))


@jit
def _is_sound(variance: Any, squares: Any) -> Any:
    """Whether fp32 sums gave a variance that is right to far less than a bfloat16's last bit: little cancelled, no square out of range."""
    return variance > squares * np.float32(0.125) and np.float32(1e-20) < squares < np.float32(1e30)


@jit_any_order
def _sums(row: Any, eta: Any, mask: Any) -> Any:
    """Sum and sum of squares, in float64, of z less its first value, and of z where kept."""
    first = np.float64(to_float(row[0]) - at(eta, 0))
    dense, dense_squares, sparse, sparse_squares = 0.0, 0.0, 0.0, 0.0
    for i in range(row.size):
        z = np.float64(to_float(row[i]) - at(eta, i))
        shifted = z - first
        kept = z if mask[i] else 0.0
        dense += shifted
        dense_squares += shifted * shifted
        sparse += kept
        sparse_squares += kept * kept
    return dense, dense_squares, sparse, sparse_squares


@jit_any_order
def _sums_of_pairs(row: Any, eta: Any, mask: Any) -> Any:
    """Sum and sum of squares, in fp32, of z, and of z where kept."""
    zero = np.float32(0)
    dense, dense_squares, sparse, sparse_squares = zero, zero, zero, zero
    for i in range(row.size):
        low, high = two_floats(row[i])
        low, high = low - at(eta, 2 * i), high - at(eta, 2 * i + 1)
        low_kept, high_kept = kept_of_two(low, high, mask[i])
        dense += low + high
        dense_squares += low * low + high * high
        sparse += low_kept + high_kept
        sparse_squares += low_kept * low_kept + high_kept * high_kept
    return dense, dense_squares, sparse, sparse_squares
