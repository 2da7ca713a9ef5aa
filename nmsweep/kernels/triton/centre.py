"""η of each token on CUDA: the median or the mean of its channels."""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.numbers import mean, median, to_float
from nmsweep.kernels.triton.select import count_numbers, kth_lowest


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
def packed_median_kernel(x_ptr, eta_ptr, hidden, KIND: tl.constexpr, T: tl.constexpr):
    """One token of an even number of 16-bit channels a program, as words: fp32 [token]."""
    row = tl.program_id(0).to(tl.int64)
    n_words = hidden // 2
    word = tl.arange(0, T)
    x = tl.load(x_ptr + row * n_words + word, mask=word < n_words, other=0x7FFF7FFF)  # NaN is below nothing
    middle = to_float(kth_lowest(x, (hidden - 1) // 2, True, KIND).to(tl.int16), KIND)
    has_nan = count_numbers(x, KIND) < hidden
    tl.store(eta_ptr + row, tl.where(has_nan, float("nan"), middle + 0.0))
