"""The kernel of the Triton backend with ν: groups of one token a program. ETA as in triton_kernels."""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.kernels import chosen, filling, keys, rescaled, to_rescale
from nmsweep.kernels.triton.network import keep_of_groups, load, store, sum_of_squares
from nmsweep.kernels.triton.numbers import ratio_of_sums, to_float


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
    """Multiply what u is away from η by ν. GUARD where the formula alone would not pass x where z is 0: ν is below 1 or no number."""
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
    """One token a program, with ν: G groups at a time are pruned into u, then those of u that η is not are rescaled.

    What the second loop reads, its thread has written in the first. Where z is 0 x passes, so pruned channels need no mask.
    """
    # so that a constant token has variance 0; of bfloat16 the sums are exact there, and a median or mean leaves 0
    SHIFT: tl.constexpr = KIND != 0 or ETA == 1 or ETA == 2
    row = tl.program_id(0).to(tl.int64)
    n_groups = hidden // M
    first = to_float(tl.load(x_ptr + row * hidden), KIND)
    if ETA == 3:
        first -= tl.load(eta_ptr + row)
    elif ETA > 0:
        first -= tl.load(eta_ptr)
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
