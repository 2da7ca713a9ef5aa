"""η of each token on CUDA: the median or the mean of its channels.

The median of 16-bit values is found bit by bit from the top, each time counting the values below a candidate; two values are compared at
once, as floats: they order as their bits do, ±0 being one number, and a NaN, which is below nothing, makes the median NaN.
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from .triton_numbers import mean, median, to_float


@triton.jit
def centre_kernel(x_ptr, eta_ptr, hidden, KIND: tl.constexpr, STAT: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """One token a program: fp32 [token], a value of the dtype of x. STAT: 1 median, 2 mean."""
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
def _below(x, candidate, KIND: tl.constexpr, EMULATE: tl.constexpr):
    """1.0 in each half of [G, W] words that is below the candidate, in the dtype of the halves; packed."""
    if EMULATE:
        low, high = to_float((x & 0xFFFF).to(tl.int16), KIND), to_float((x >> 16).to(tl.int16), KIND)
        value = to_float((candidate & 0xFFFF).to(tl.int16), KIND)
        one: tl.constexpr = 0x3F80 if KIND == 0 else 0x3C00
        found = tl.where(low < value, one, 0) | (tl.where(high < value, one, 0) << 16)
    elif KIND == 0:
        found = tl.inline_asm_elementwise(
            "set.lt.bf16x2.bf16x2 $0, $1, $2;", "=r,r,r", [x, candidate], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = tl.inline_asm_elementwise(
            "set.lt.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [x, candidate], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def _add_bf16(a, b):
    return tl.inline_asm_elementwise(
        "{.reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2;}",
        "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _add_f16(a, b):
    return tl.inline_asm_elementwise("add.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _count(ones, KIND: tl.constexpr, EMULATE: tl.constexpr):
    """The ones of a tile [G, W] of packed numbers, fp32; exact, as a row of W adds up to 16 in each half."""
    if EMULATE:
        low, high = to_float((ones & 0xFFFF).to(tl.int16), KIND), to_float((ones >> 16).to(tl.int16), KIND)
        found = tl.sum(tl.sum(low + high, axis=1), axis=0)
    else:
        if KIND == 0:
            sums = tl.reduce(ones, 1, _add_bf16)
        else:
            sums = tl.reduce(ones, 1, _add_f16)
        low, high = to_float((sums & 0xFFFF).to(tl.int16), KIND), to_float((sums >> 16).to(tl.int16), KIND)
        found = tl.sum(low + high, axis=0)
    return found


@triton.jit
def packed_median_kernel(
    x_ptr, eta_ptr, hidden, KIND: tl.constexpr, W: tl.constexpr, G: tl.constexpr, EMULATE: tl.constexpr
):
    """One token of an even number of 16-bit channels a program, as words: fp32 [token]."""
    INFINITY: tl.constexpr = 0x7F80 if KIND == 0 else 0x7C00
    row = tl.program_id(0).to(tl.int64)
    n_words = hidden // 2
    place = tl.arange(0, G)[:, None] * W + tl.arange(0, W)[None, :]
    x = tl.load(x_ptr + row * n_words + place, mask=place < n_words, other=0x7FFF7FFF)  # NaN is below nothing
    size = x & 0x7FFF7FFF
    largest = tl.max(tl.max(tl.where(place < n_words, tl.maximum(size & 0xFFFF, size >> 16), 0), axis=1), axis=0)
    rank = (hidden - 1) // 2
    found = tl.full((), 0, tl.int32)
    for step in range(16):
        candidate = found | (0x8000 >> step)
        bits = tl.where(candidate >= 0x8000, candidate & 0x7FFF, candidate ^ 0xFFFF)
        below = _count(_below(x, tl.zeros_like(x) + bits * 0x10001, KIND, EMULATE), KIND, EMULATE)
        past_infinity = candidate > 0x8000 + INFINITY
        found = tl.where((below <= rank) & (past_infinity == 0), candidate, found)
    bits = tl.where(found >= 0x8000, found & 0x7FFF, found ^ 0xFFFF)
    eta = to_float(bits.to(tl.int16), KIND)
    tl.store(eta_ptr + row, tl.where(largest > INFINITY, float("nan"), eta + 0.0))
