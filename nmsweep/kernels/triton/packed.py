"""Prune 16-bit values by magnitude alone, two channels per register: the fastest path of the Triton backend.

A word holds an even channel (low half) and the odd one after it (high half). Hopper's packed minimum and maximum sort both at once,
then the two sorted halves are merged. Keys leave the top bit of a half free, so one subtraction compares both halves, and the top bits
of the difference are the masks.
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.network import load, lower, reverse, running_sum, settle, sign, sort, store
from nmsweep.kernels.triton.numbers import EMULATE
from nmsweep.kernels.triton.parts import make_words
from nmsweep.kernels.triton.select import count_numbers, kth_lowest


@triton.jit
def _threshold(key, N: tl.constexpr, W: tl.constexpr):
    """Return the N-th highest of the 2·W keys of each row of [G, W] words: [G, 1]."""
    ordered = sort(key, W, 1, True)
    even, odd = ordered & 0xFFFF, reverse(ordered >> 16, W, W)
    if N <= W:
        rest = tl.maximum(even, odd)  # the W highest of all, as a bitonic run
    else:
        rest = tl.minimum(even, odd)
    if N == W:
        found = tl.min(rest, axis=1)
    else:
        place: tl.constexpr = W - N if N < W else 2 * W - N
        found = tl.max(tl.where(tl.arange(0, W)[None, :] == place, settle(rest, W, W // 2, False), -1), axis=1)
    return found[:, None]


@triton.jit
def _ones(top):
    """Move the top bit of each half to its lowest place."""
    return (top.to(tl.uint32, bitcast=True) >> 15).to(tl.int32, bitcast=True)


@triton.jit
def _swapped(x):
    """Exchange the halves of each word."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits << 16) | (bits >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def _spread(top):
    """Copy the top bit of each half to all its bits."""
    if EMULATE:
        found = _ones(top) * 0xFFFF
    else:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xbb99;", "=r,r", [top], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def packed_kernel(
    x_ptr,
    u_ptr,
    scale_ptr,
    gain_ptr,
    counts_ptr,
    n_groups,
    N: tl.constexpr,
    M: tl.constexpr,
    KIND: tl.constexpr,
    GAIN: tl.constexpr,
    NAN: tl.constexpr,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Keep the N largest magnitudes of each group of M channels, lower channels first, and zero the others. G groups per program.

    x and u are words; a token has ROW groups. NAN is the key of every NaN, in both halves. The top bit of each half of `above`,
    `equal`, … is the flag.
    """
    W: tl.constexpr = M // 2
    TOP: tl.constexpr = -0x7FFF8000  # the top bits of both halves
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    valid = group < n_groups
    x = load(x_ptr, group * W, valid, 0, W, W, 4)
    if GAIN == 3:
        x = make_words(x, 1.0, load(gain_ptr, group * W, valid, 0, W, W, 4), GAIN, KIND)
    elif GAIN > 0:
        number = tl.minimum(group, n_groups - 1).to(tl.int32)  # a 64-bit division would cost more than the rest
        row = number // ROW
        gain = load(gain_ptr, (number - row * ROW) * W, valid, 0, W, W, 4 if GAIN == 1 else 2)
        x = make_words(x, tl.load(scale_ptr + row)[:, None], gain, GAIN, KIND)
    key = lower(x & 0x7FFF7FFF, tl.full(x.shape, NAN, tl.int32), True)
    threshold = _threshold(key, N, W) * 0x10001
    raised = key | TOP
    at_least = raised - threshold
    above = (at_least - 0x10001) & TOP
    equal = (at_least ^ above) & TOP
    n_above = tl.sum(_ones(above), axis=1)[:, None]
    room = N - (n_above & 0xFFFF) - (n_above >> 16)
    one = _ones(equal)
    before = running_sum(one, W)  # equals among the even channels, and among the odd ones, up to here
    place = before + _swapped(before) - (one >> 16)  # among all channels up to each
    kept = above | (equal & (((room * 0x10001) | TOP) - place))
    store(u_ptr, group * W, valid, x & _spread(kept), W, W, 4)
    if counts_ptr is not None:
        n_kept = tl.sum(_ones(kept), axis=1)
        n_kept = tl.sum(tl.where(valid, (n_kept & 0xFFFF) + (n_kept >> 16), 0), axis=0)
        tl.atomic_add(counts_ptr, n_kept.to(tl.int64), sem="relaxed")
        if tl.program_id(0) == 0:
            tl.atomic_add(counts_ptr + 1, tl.full((), M, tl.int64) * n_groups, sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def packed_row_kernel(
    x_ptr,
    u_ptr,
    scale_ptr,
    gain_ptr,
    counts_ptr,
    hidden,
    N,
    KIND: tl.constexpr,
    GAIN: tl.constexpr,
    NAN: tl.constexpr,
    T: tl.constexpr,
):
    """Keep the N largest magnitudes of one token per program, lower channels first; its even number of channels makes at most T words."""
    TOP: tl.constexpr = -0x7FFF8000
    row = tl.program_id(0).to(tl.int64)
    n_words = hidden // 2
    word = tl.arange(0, T)
    inside = word < n_words
    x = tl.load(x_ptr + row * n_words + word, mask=inside, other=0)  # ranks after all others
    if GAIN > 0:
        scale = 1.0 if GAIN == 3 else tl.load(scale_ptr + row)
        gain = tl.load(gain_ptr + (row * n_words + word if GAIN == 3 else word), mask=inside, other=0)
        x = make_words(x, scale, gain, GAIN, KIND)
        x = tl.where(inside, x, 0)  # 0 times a NaN scale is NaN
    size = x & 0x7FFF7FFF
    k = 2 * T - N
    number = kth_lowest(size, k, False, KIND)
    threshold = tl.where(count_numbers(size, KIND) > k, number, NAN & 0xFFFF)
    at_least = (lower(size, tl.full(x.shape, NAN, tl.int32), True) | TOP) - threshold * 0x10001
    above = (at_least - 0x10001) & TOP
    equal = (at_least ^ above) & TOP
    n_above = tl.sum(_ones(above), axis=0)
    room = N - (n_above & 0xFFFF) - (n_above >> 16)
    one = _ones(equal)
    odd = one >> 16
    place = tl.cumsum((one & 0xFFFF) + odd, axis=0)  # among all channels up to the odd one
    fits = (~sign(room - place + odd) & 0x8000) | (~sign(room - place) & -0x80000000)
    kept = above | (equal & fits)
    tl.store(u_ptr + row * n_words + word, x & _spread(kept), mask=word < n_words)
    if counts_ptr is not None:
        n_kept = tl.sum(_ones(kept), axis=0)
        tl.atomic_add(counts_ptr, ((n_kept & 0xFFFF) + (n_kept >> 16)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
