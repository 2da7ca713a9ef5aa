"""Selection by a sorting network along an axis that lies within a thread.

`halves` and `weave` split and join a tensor along such an axis, so they only rename registers and a comparator costs one minimum and
one maximum. LLVM drops the comparators that do not reach the n-th largest.
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.numbers import EMULATE


@triton.jit
def halves(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Split [G, OUTER·2·INNER] along the middle axis into two [G, OUTER, INNER]."""
    G: tl.constexpr = x.shape[0]
    return tl.split(tl.permute(tl.reshape(x, (G, OUTER, 2, INNER)), (0, 1, 3, 2)))


@triton.jit
def weave(a, b, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Undo `halves`."""
    G: tl.constexpr = a.shape[0]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (G, OUTER * 2 * INNER))


@triton.jit
def reverse(x, P: tl.constexpr, RUN: tl.constexpr):
    """Reverse every run of RUN channels of [G, P]."""
    if RUN > 1:
        a, b = halves(x, P // RUN, RUN // 2)
        x = reverse(weave(b, a, P // RUN, RUN // 2), P, RUN // 2)
    return x


@triton.jit
def lower(a, b, PACKED: tl.constexpr):
    """Return the minimum of two keys; with PACKED, that of each half of two words of two 16-bit keys ≥ 0."""
    if not PACKED:
        found = tl.minimum(a, b)
    elif EMULATE:
        found = tl.minimum(a & 0xFFFF, b & 0xFFFF) | (tl.minimum(a >> 16, b >> 16) << 16)
    else:
        found = tl.inline_asm_elementwise(
            "min.s16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def upper(a, b, PACKED: tl.constexpr):
    """Return the maximum of two keys; with PACKED, that of each half of two words of two 16-bit keys ≥ 0."""
    if not PACKED:
        found = tl.maximum(a, b)
    elif EMULATE:
        found = tl.maximum(a & 0xFFFF, b & 0xFFFF) | (tl.maximum(a >> 16, b >> 16) << 16)
    else:
        found = tl.inline_asm_elementwise(
            "max.s16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def settle(x, P: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr):
    """Sort every bitonic run of 2·STEP channels; with PACKED of words, each half by itself."""
    if STEP > 0:
        a, b = halves(x, P // (2 * STEP), STEP)
        x = weave(lower(a, b, PACKED), upper(a, b, PACKED), P // (2 * STEP), STEP)
        x = settle(x, P, STEP // 2, PACKED)
    return x


@triton.jit
def sort(x, P: tl.constexpr, RUN: tl.constexpr, PACKED: tl.constexpr):
    """Sort [G, P] along channels, ascending, if runs of RUN channels are sorted already; with PACKED each half of words by itself."""
    if RUN < P:
        G: tl.constexpr = x.shape[0]
        a, b = halves(x, P // (2 * RUN), RUN)
        b = tl.reshape(reverse(tl.reshape(b, (G, P // 2)), P // 2, RUN), (G, P // (2 * RUN), RUN))
        x = weave(lower(a, b, PACKED), upper(a, b, PACKED), P // (2 * RUN), RUN)
        x = sort(settle(x, P, RUN // 2, PACKED), P, RUN * 2, PACKED)
    return x


@triton.jit
def running_sum(x, P: tl.constexpr):
    """Return inclusive sums along the channels of [G, P]."""
    if P > 1:
        G: tl.constexpr = x.shape[0]
        even, odd = halves(x, P // 2, 1)
        pairs = tl.reshape(running_sum(tl.reshape(even + odd, (G, P // 2)), P // 2), (G, P // 2, 1))
        x = weave(pairs - odd, pairs, P // 2, 1)
    return x


@triton.jit
def sum_of_squares(x, P: tl.constexpr):
    """Return the sum of squares of each row of [G, P]: [G]."""
    if P > 1:
        a, b = halves(x, 1, P // 2)
        if P > 2:
            a, c = halves(tl.reshape(a, (x.shape[0], P // 2)), 1, P // 4)
            b, d = halves(tl.reshape(b, (x.shape[0], P // 2)), 1, P // 4)
            squares = tl.fma(a, a, tl.fma(b, b, tl.fma(c, c, d * d)))
        else:
            squares = tl.fma(a, a, b * b)
        found = tl.sum(tl.sum(squares, axis=2), axis=1)
    else:
        found = tl.sum(x * x, axis=1)
    return found


@triton.jit
def load(ptr, base, valid, other, M: tl.constexpr, P: tl.constexpr, PIECE: tl.constexpr):
    """Load [G, P]: M values from each base [G] on, `other` beyond M and where not valid [G]; in pieces that keep a group in one thread."""
    G: tl.constexpr = base.shape[0]
    if P <= PIECE:
        channel = tl.arange(0, P)
        value = tl.load(ptr + base[:, None] + channel, mask=valid[:, None] & (channel < M)[None, :], other=other)
    else:
        a = load(ptr, base, valid, other, M, P // 2, PIECE)
        b = load(ptr + P // 2, base, valid, other, M - P // 2, P // 2, PIECE)
        value = weave(tl.reshape(a, (G, 1, P // 2)), tl.reshape(b, (G, 1, P // 2)), 1, P // 2)
    return value


@triton.jit
def store(ptr, base, valid, value, M: tl.constexpr, P: tl.constexpr, PIECE: tl.constexpr):
    """Store what `load` loads."""
    G: tl.constexpr = base.shape[0]
    if P <= PIECE:
        channel = tl.arange(0, P)
        tl.store(ptr + base[:, None] + channel, value, mask=valid[:, None] & (channel < M)[None, :])
    else:
        a, b = halves(value, 1, P // 2)
        store(ptr, base, valid, tl.reshape(a, (G, P // 2)), M, P // 2, PIECE)
        store(ptr + P // 2, base, valid, tl.reshape(b, (G, P // 2)), M - P // 2, P // 2, PIECE)


@triton.jit
def sign(x):
    """Copy the top bit of int32 to all its bits, by an explicit shift that the compiler cannot turn into a predicate."""
    if EMULATE:
        found = x >> 31
    else:
        found = tl.inline_asm_elementwise("shr.s32 $0, $1, 31;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return found


@triton.jit
def keep_of_groups(key, N: tl.constexpr, M: tl.constexpr, P: tl.constexpr):
    """Return int32 [G, P] with all bits set for the N highest of the first M keys of each row, lower channels first.

    Masks are integers made of signs, because a thread has more registers than predicates. The channel makes 16-bit keys unique.
    """
    channel = tl.arange(0, P)[None, :]
    narrow: tl.constexpr = key.dtype.primitive_bitwidth == 16
    if narrow:
        key = key.to(tl.int32) * P + (P - 1 - channel)
    if M < P:
        key = tl.where(channel < M, key, -1)
    threshold = tl.max(tl.where(channel == P - N, sort(key, P, 1, False), -1), axis=1)[:, None]
    at_least = ~sign(key - threshold)
    if narrow:
        kept = at_least
    else:
        above = sign(threshold - key)
        equal = at_least & ~above
        room = N + tl.sum(above, axis=1)[:, None]
        kept = above | (equal & ~sign(room + running_sum(equal, P)))
    return kept
