"""The bodies that the threads of the cpu backend run, compiled by numba: whole tokens, or one stream of blocks.

Bit patterns are arrays of uint16 for bfloat16, int16 for float16 and uint32 for float32, so the compiler specialises by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from .cpu_lanes import (
    LANES,
    OCTETS,
    call_blocks,
    fetch_add,
    float_bits,
    from_float,
    in_order,
    jit,
    jit_any_order,
    kth_of_16,
    kth_of_32,
    pointer,
    to_float,
)

_EXPONENT = 0x7FF << 52  # of a float64


@jit
def plain(p: Any, storage: Any, stamp: int) -> None:
    """Keep by magnitude: x and u as one stream of blocks; the last one goes through padded scratch."""
    call = carray(p, 1)[0]
    shared = carray(p, 1).ctypes.data
    itemsize = np.empty(0, storage).itemsize
    width = 512 // (8 * itemsize) * call.m
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
        kept += call_blocks(call.select, source, call.u + offset, min(call.chunk, n_blocks - first))
        rest = call.total - n_blocks * width
        if chunk == call.n_chunks - 1 and rest > 0:
            last = made[(n_blocks - first) * width :] if call.made != 0 else x[call.total - rest :]
            scratch = np.zeros(width, storage)
            for i in range(rest):
                scratch[i] = last[i]
            kept += call_blocks(call.select, scratch.ctypes.data, scratch.ctypes.data, 1)
            kept -= call.n * ((width - rest) // call.m)  # the groups of the padding
            for i in range(rest):
                u[call.total - rest + i] = scratch[i]
    fetch_add(shared + 8, kept)


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
    block = 512 // (8 * np.empty(0, key_type).itemsize) * call.padded_m
    room = (call.chunk * (hidden // call.m) * call.padded_m + block - 1) // block * block
    keys = np.empty(room, key_type)  # of padded groups for the network, dense for the threshold
    masks = np.empty(room, key_type)
    ordered = np.empty(hidden + LANES, unsigned)
    halves = np.empty(hidden + LANES, np.uint16)
    octets = np.empty(hidden + OCTETS, np.uint8)
    candidates = np.empty(call.m + LANES, key_type)
    made = np.empty((call.chunk if call.made != 0 else 0, hidden), storage)
    token_eta = np.zeros(call.chunk, storage)
    eta = np.zeros(hidden, np.float32)
    fill = np.zeros(hidden, storage)
    if call.eta != 0:
        _given_eta(call, eta, fill)
    ones = np.ones(hidden, np.float32)
    kept = 0
    while True:
        chunk = fetch_add(shared, 1)
        if chunk >= call.n_chunks:
            break
        first = chunk * call.chunk
        rows = min(call.chunk, call.total - first)
        tokens = x[first : first + rows]
        if call.made != 0:
            _make(call, x.reshape(-1), first * hidden, (first + rows) * hidden, made.reshape(-1))
            tokens = made
        for r in range(rows):
            row = tokens[r]
            if call.centre != 0:
                token_eta[r] = _median(row, ordered, halves, octets, call.infinity) if call.centre == 1 else _mean(row)
                _set(fill, token_eta[r])
                _set(eta, to_float(token_eta[r]))
            _keys_of_row(call, first + r, row, eta, ones, keys[r * hidden : (r + 1) * hidden])
        _select(call, rows * (hidden // call.m), block, keys, masks, candidates, halves, octets)
        for r in range(rows):
            row, row_mask = tokens[r], masks[r * hidden : (r + 1) * hidden]
            if call.centre != 0:
                _set(fill, token_eta[r])
                _set(eta, to_float(token_eta[r]))
            nu = np.float32(1)
            if call.var != 0:
                nu = _variance_ratio(row, eta, row_mask)
                if call.nu != 0:
                    nu_out[first + r] = nu
            if nu == np.float32(1):
                _write(row, row_mask, fill, u[first + r])
            else:
                _rescale(row, row_mask, eta, fill, nu, u[first + r])
            if call.mask != 0:
                _write_mask(row_mask, mask_out[first + r])
            kept += _count(row_mask)
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
        if call.wide_gain != 0:
            _scale_wide(values, scale, wide_gains[channel:], out)
        elif call.gain == 0:
            _scale(values, scale, out)
        else:
            factors = gains[begin:] if call.gain_step != 0 else gains[channel:]
            if call.scale != 0:
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
def _scale_and_multiply(x: Any, scale: Any, gain: Any, made: Any) -> None:
    for i in range(made.size):
        scaled = to_float(from_float(to_float(x[i]) * scale, made))
        made[i] = from_float(scaled * to_float(gain[i]), made)


@jit
def _given_eta(call: Any, eta: Any, fill: Any) -> None:
    """The η of the call, a number or one for each channel, as values and as bit patterns."""
    values = carray(pointer(call.eta), (eta.size,), np.float32)
    patterns = carray(pointer(call.eta_bits), (eta.size,), fill.dtype)
    for i in range(eta.size):
        eta[i], fill[i] = values[i * call.eta_step], patterns[i * call.eta_step]


@jit
def _keys_of_row(call: Any, number: int, row: Any, eta: Any, ones: Any, keys: Any) -> None:
    """Keys of one token, by its number."""
    if keys.itemsize == 2:
        _magnitudes(row, call.infinity + 1, keys)
    elif call.weight != 0:
        start = number // call.rows_per_weight * row.size
        _scores(row, eta, carray(pointer(call.weight + 4 * start), (row.size,), np.float32), keys)
    else:
        _scores(row, eta, ones, keys)


@jit
def _select(
    call: Any, n_groups: int, block: int, keys: Any, masks: Any, candidates: Any, halves: Any, octets: Any
) -> None:
    """Masks of groups of keys: by the network compiled for them, or without one by the value of the n-th highest."""
    m, padded_m = call.m, call.padded_m
    if call.select == 0:
        for group in range(n_groups):
            start, end = group * m, (group + 1) * m
            _threshold(keys[start:end], call.n, candidates, halves, octets, masks[start:end])
        return
    if padded_m != m:
        _spread(keys, n_groups, m, padded_m)
    call_blocks(call.select, keys.ctypes.data, masks.ctypes.data, (n_groups * padded_m + block - 1) // block)
    if padded_m != m:
        _gather(masks, n_groups, m, padded_m)


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
        key = np.int32(float_bits((to_float(row[i]) - eta[i]) * weight[i]) & 0x7FFFFFFF)
        keys[i] = key if key < highest else highest


@jit
def _threshold(keys: Any, n: int, candidates: Any, halves: Any, octets: Any, masks: Any) -> None:
    """Masks of the n highest keys, by the value of the n-th; of its equals the lower channels are kept."""
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
    for i in range(last):
        masks[i] = -np.int32(keys[i] >= threshold)
    for i in range(last, m):
        masks[i] = -np.int32(keys[i] > threshold)


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
        out[i] = (row[i] & mask[i]) | (fill[i] & ~mask[i])


@jit
def _rescale(row: Any, mask: Any, eta: Any, fill: Any, nu: Any, out: Any) -> None:
    more = nu - np.float32(1)
    for i in range(row.size):
        value = to_float(row[i])
        z = value - eta[i]
        rescaled = row[i] if z == 0 else from_float(value + more * z, row)
        out[i] = (rescaled & mask[i]) | (fill[i] & ~mask[i])


@jit
def _write_mask(mask: Any, out: Any) -> None:
    for i in range(mask.size):
        out[i] = mask[i] & 1


@jit
def _count(mask: Any) -> Any:
    kept = np.int32(0)
    for i in range(mask.size):
        kept += np.int32(mask[i] & 1)
    return kept


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


@jit_any_order
def _variance_ratio(row: Any, eta: Any, mask: Any) -> Any:
    """ν of one token of which at least one channel is pruned, so that Var k⊙z is 0 only if k⊙z is."""
    first = np.float64(to_float(row[0]) - eta[0])
    dense, dense_squares, sparse, sparse_squares = 0.0, 0.0, 0.0, 0.0
    for i in range(row.size):
        z = np.float64(to_float(row[i]) - eta[i])
        shifted = z - first
        kept = z if mask[i] else 0.0
        dense += shifted
        dense_squares += shifted * shifted
        sparse += kept
        sparse_squares += kept * kept
    dense_variance = dense_squares - dense * dense / row.size
    sparse_variance = sparse_squares - sparse * sparse / row.size
    if dense_variance == 0 or sparse_variance == 0:
        return np.float32(1)
    return np.float32(np.sqrt(dense_variance / sparse_variance))
