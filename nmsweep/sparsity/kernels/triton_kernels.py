"""The kernels of the Triton backend: `flat_kernel` takes groups as one stream, `row_kernel` holds one token a program."""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from .triton_network import keep_of_groups, keep_of_row, load, store
from .triton_numbers import from_float, magnitude, mean, median, score, to_float, total, variance_ratio


@triton.jit
def flat_kernel(
    x_ptr,
    u_ptr,
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
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
):
    """G groups a program, across tokens."""
    group = tl.program_id(0) * G + tl.arange(0, G)
    valid = group < n_groups
    inside = valid[:, None] & (tl.arange(0, P) < M)[None, :]
    base = group.to(tl.int64) * M
    x = load(x_ptr, base, valid, 0, M, P, PIECE)
    row = group // groups_per_row
    start = (group - row * groups_per_row) * M
    if eta_ptr is None:
        eta = 0.0
        fill = 0
    elif VECTOR:
        eta = load(eta_ptr, start, valid, 0.0, M, P, PIECE)
        fill = from_float(eta, KIND)
    else:
        eta = tl.load(eta_ptr)
        fill = from_float(eta, KIND)
    if weight_ptr is None and eta_ptr is None and KIND < 2:
        key = magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = load(
                weight_ptr,
                (row // rows_per_weight).to(tl.int64) * (groups_per_row * M) + start,
                valid,
                0.0,
                M,
                P,
                PIECE,
            )
        key = score(to_float(x, KIND) - eta, weight)
    kept = keep_of_groups(key, inside, N, P)
    store(u_ptr, base, valid, tl.where(kept, x, fill).to(x.dtype), M, P, PIECE)
    if mask_ptr is not None:
        store(mask_ptr, base, valid, kept.to(tl.int8), M, P, PIECE)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, total(kept.to(tl.int32)).to(tl.int64), sem="relaxed")
        if tl.program_id(0) == 0:
            tl.atomic_add(counts_ptr + 1, n_groups.to(tl.int64) * M, sem="relaxed")


@triton.jit
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
    N: tl.constexpr,
    M: tl.constexpr,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    STAT: tl.constexpr,
    VAR: tl.constexpr,
):
    """One token a program, as a tile [G, P] of groups (of WIDTH consecutive channels where there are no groups)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.arange(0, G) * WIDTH
    valid = start < hidden
    channel = start[:, None] + tl.arange(0, P)[None, :]
    inside = (channel < hidden) & (tl.arange(0, P) < WIDTH)[None, :]
    base = row * hidden + start
    if THRESHOLD:  # the last piece may be cut
        x = tl.load(x_ptr + row * hidden + channel, mask=inside, other=0)
    else:
        x = load(x_ptr, base, valid, 0, WIDTH, P, PIECE)
    if STAT == 1:
        eta = median(x, inside, hidden, KIND)
    elif STAT == 2:
        eta = mean(x, inside, hidden, KIND)
    elif eta_ptr is None:
        eta = 0.0
    elif VECTOR:
        eta = tl.load(eta_ptr + channel, mask=inside, other=0.0)
    else:
        eta = tl.load(eta_ptr)
    z = to_float(x, KIND) - eta
    if STAT == 0 and eta_ptr is None and weight_ptr is None and KIND < 2:
        key = magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row // rows_per_weight * hidden + channel, mask=inside, other=0.0)
        key = score(z, weight)
    if THRESHOLD:
        kept = keep_of_row(key, inside, N, key.dtype.primitive_bitwidth - 1)
    else:
        kept = keep_of_groups(key, inside, N, P)
    fill = 0
    if STAT > 0 or eta_ptr is not None:
        fill = from_float(eta, KIND)
    value = x
    if VAR:
        first = tl.load(x_ptr + row * hidden)
        if eta_ptr is not None:
            first_z = to_float(first, KIND) - tl.load(eta_ptr)
        else:
            first_z = to_float(first, KIND) - eta
        nu = variance_ratio(z, first_z, kept, inside, hidden)
        if nu_ptr is not None:
            tl.store(nu_ptr + row, nu)
        rescaled = from_float(to_float(x, KIND) + (nu - 1.0) * z, KIND)
        value = tl.where(nu == 1.0, x, rescaled)
    result = tl.where(kept, value, fill).to(x.dtype)
    if THRESHOLD:
        tl.store(u_ptr + row * hidden + channel, result, mask=inside)
    else:
        store(u_ptr, base, valid, result, WIDTH, P, PIECE)
    if mask_ptr is not None:
        tl.store(mask_ptr + row * hidden + channel, kept.to(tl.int8), mask=inside)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, total(kept.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
