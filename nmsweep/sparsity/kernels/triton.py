"""The primitive on CUDA, in Triton.

A thread holds whole groups in its registers. `_halves` and `_weave` split and join a tensor along an axis that lies within a thread, so
they only rename registers, and a comparator of the sorting network is one minimum and one maximum, nothing else; LLVM drops the
comparators that do not reach the n-th largest. So that a group lands in one thread, it is loaded in pieces of 16 bytes.

`_flat_kernel` takes groups as one stream (no statistic of a token is needed); `_row_kernel` holds one token a program.
Bit patterns travel as integers, so kept channels pass bit for bit. Runs on CPU tensors under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Arguments

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_STATS = {"none": 0, "median": 1, "mean": 2}
_LARGEST_M = 64
_LARGEST_ROW = 65536  # channels of a token that one program can hold
_PIECE_BYTES = 16  # the widest load of a thread
_THRESHOLD_GROUP = 8  # shape of the tile where no groups exist: consecutive channels of a thread

#: (groups of a program, warps) of _flat_kernel by padded M. Change through tune().
FLAT_CONFIGS = {1: (2048, 4), 2: (1024, 4), 4: (512, 4), 8: (256, 4), 16: (128, 4), 32: (128, 4), 64: (64, 2)}


def supports(args: Arguments) -> bool:
    """Whether this backend can run the call; else the reference does."""
    on_device = args.x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not on_device or args.x.dtype not in _KINDS:
        return False
    hidden, per_token = args.x.shape[-1], args.stat != "none" or args.var
    return (args.m <= _LARGEST_M and not per_token) or (
        hidden <= _LARGEST_ROW and args.m in (*range(_LARGEST_M + 1), hidden)
    )


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """u of one call; `mask` bool [*, hidden] and `nu` fp32 [*, 1] are filled and `counts` int64 [2] is added to, where given."""
    x = args.x.contiguous()
    u = torch.empty_like(x)
    hidden, n, m = x.shape[-1], args.n, args.m
    pattern = _PATTERNS[x.dtype]
    weight = None if args.weight is None else args.weight.to(device=x.device, dtype=torch.float32).contiguous()
    eta = None
    if args.eta is not None:
        eta = (args.eta.detach().to(device=x.device, dtype=x.dtype) + 0.0).to(torch.float32).contiguous()
    common: dict[str, Any] = {
        "x_ptr": x.view(pattern),
        "u_ptr": u.view(pattern),
        "weight_ptr": weight,
        "eta_ptr": eta,
        "mask_ptr": None if mask is None else mask.view(torch.int8),
        "counts_ptr": counts,
        "rows_per_weight": args.rows_per_weight if weight is not None and weight.ndim == 2 else x.numel(),
        "N": n,
        "M": m,
        "KIND": _KINDS[x.dtype],
        "VECTOR": eta is not None and eta.numel() > 1,
        "PIECE": _PIECE_BYTES // x.element_size(),
        "enable_fp_fusion": False,  # every rounding of the formula is a rounding
    }
    with torch.cuda.device_of(x):
        if m <= _LARGEST_M and args.stat == "none" and not args.var:
            _launch_flat(common, x.numel() // m, hidden // m)
        else:
            _launch_row(common, x.numel() // hidden, hidden, args, nu)
    return u


def _launch_flat(common: dict[str, Any], n_groups: int, groups_per_row: int) -> None:
    padded_m = triton.next_power_of_2(common["M"])
    groups, warps = FLAT_CONFIGS[padded_m]
    _flat_kernel[(triton.cdiv(n_groups, groups),)](
        **common, n_groups=n_groups, groups_per_row=groups_per_row, P=padded_m, G=groups, num_warps=warps
    )


def _launch_row(common: dict[str, Any], n_rows: int, hidden: int, args: Arguments, nu: Tensor | None) -> None:
    threshold = args.m > _LARGEST_M
    width = _THRESHOLD_GROUP if threshold else args.m
    padded_m = triton.next_power_of_2(width)
    groups = triton.next_power_of_2(triton.cdiv(hidden, width))
    warps = min(32, max(4, groups * padded_m // 1024))
    _row_kernel[(n_rows,)](
        **common,
        nu_ptr=nu,
        hidden=hidden,
        THRESHOLD=threshold,
        WIDTH=width,
        P=padded_m,
        G=groups,
        STAT=_STATS[args.stat],
        VAR=args.var,
        num_warps=warps,
    )


# ---- an axis within a thread -------------------------------------------------------------------------------------------------------


@triton.jit
def _halves(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """[G, OUTER·2·INNER] -> two [G, OUTER, INNER], apart on the middle axis."""
    G: tl.constexpr = x.shape[0]
    return tl.split(tl.permute(tl.reshape(x, (G, OUTER, 2, INNER)), (0, 1, 3, 2)))


@triton.jit
def _weave(a, b, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Undo _halves."""
    G: tl.constexpr = a.shape[0]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (G, OUTER * 2 * INNER))


@triton.jit
def _reverse(x, P: tl.constexpr, RUN: tl.constexpr):
    """Reverse every run of RUN channels of [G, P]."""
    if RUN > 1:
        a, b = _halves(x, P // RUN, RUN // 2)
        x = _reverse(_weave(b, a, P // RUN, RUN // 2), P, RUN // 2)
    return x


@triton.jit
def _settle(x, P: tl.constexpr, STEP: tl.constexpr):
    """Sort every bitonic run of 2·STEP channels."""
    if STEP > 0:
        a, b = _halves(x, P // (2 * STEP), STEP)
        x = _settle(_weave(tl.minimum(a, b), tl.maximum(a, b), P // (2 * STEP), STEP), P, STEP // 2)
    return x


@triton.jit
def _sort(x, P: tl.constexpr, RUN: tl.constexpr):
    """Sort [G, P] along channels, ascending, where runs of RUN channels are sorted already."""
    if RUN < P:
        G: tl.constexpr = x.shape[0]
        a, b = _halves(x, P // (2 * RUN), RUN)
        b = tl.reshape(_reverse(tl.reshape(b, (G, P // 2)), P // 2, RUN), (G, P // (2 * RUN), RUN))
        x = _weave(tl.minimum(a, b), tl.maximum(a, b), P // (2 * RUN), RUN)
        x = _sort(_settle(x, P, RUN // 2), P, RUN * 2)
    return x


@triton.jit
def _running_sum(x, P: tl.constexpr):
    """Inclusive sums along the channels of [G, P]."""
    if P > 1:
        G: tl.constexpr = x.shape[0]
        even, odd = _halves(x, P // 2, 1)
        pairs = tl.reshape(_running_sum(tl.reshape(even + odd, (G, P // 2)), P // 2), (G, P // 2, 1))
        x = _weave(pairs - odd, pairs, P // 2, 1)
    return x


@triton.jit
def _load(ptr, base, valid, other, M: tl.constexpr, P: tl.constexpr, PIECE: tl.constexpr):
    """[G, P]: the M values from each base [G] on, `other` beyond M and where not valid [G]; in pieces, so that a thread has them all."""
    G: tl.constexpr = base.shape[0]
    if P <= PIECE:
        channel = tl.arange(0, P)
        return tl.load(ptr + base[:, None] + channel, mask=valid[:, None] & (channel < M)[None, :], other=other)
    a = _load(ptr, base, valid, other, M, P // 2, PIECE)
    b = _load(ptr + P // 2, base, valid, other, M - P // 2, P // 2, PIECE)
    return _weave(tl.reshape(a, (G, 1, P // 2)), tl.reshape(b, (G, 1, P // 2)), 1, P // 2)


@triton.jit
def _store(ptr, base, valid, value, M: tl.constexpr, P: tl.constexpr, PIECE: tl.constexpr):
    """Undo _load."""
    G: tl.constexpr = base.shape[0]
    if P <= PIECE:
        channel = tl.arange(0, P)
        tl.store(ptr + base[:, None] + channel, value, mask=valid[:, None] & (channel < M)[None, :])
    else:
        a, b = _halves(value, 1, P // 2)
        _store(ptr, base, valid, tl.reshape(a, (G, P // 2)), M, P // 2, PIECE)
        _store(ptr + P // 2, base, valid, tl.reshape(b, (G, P // 2)), M - P // 2, P // 2, PIECE)


# ---- numbers -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _to_float(pattern, KIND: tl.constexpr):
    """fp32 value of a bit pattern: exact."""
    if KIND == 0:
        return (pattern.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if KIND == 1:
        return pattern.to(tl.float16, bitcast=True).to(tl.float32)
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def _from_float(value, KIND: tl.constexpr):
    """Bit pattern of an fp32 value, rounded to nearest even; NaN stays NaN."""
    if KIND == 0:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
    if KIND == 1:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _magnitude(pattern, KIND: tl.constexpr):
    """Key of |x| for 16-bit patterns: int16, every NaN the same."""
    nan: tl.constexpr = 0x7F81 if KIND == 0 else 0x7C01
    return tl.minimum(pattern & 0x7FFF, nan).to(tl.int16)


@triton.jit
def _score(z, weight):
    """Key of |fl(z·w)|: int32, every NaN the same."""
    return tl.minimum((z * weight).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def _total(x):
    """Sum of a tile."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _keep_of_groups(key, inside, N: tl.constexpr, P: tl.constexpr):
    """Mask of the N highest keys of each row of [G, P], lower channels first; 16-bit keys are made unique by the channel."""
    channel = tl.arange(0, P)[None, :]
    narrow: tl.constexpr = key.dtype.primitive_bitwidth == 16
    if narrow:
        key = key.to(tl.int32) * P + (P - 1 - channel)
    key = tl.where(inside, key, -1)
    threshold = tl.max(tl.where(channel == P - N, _sort(key, P, 1), -1), axis=1)[:, None]
    if narrow:
        return inside & (key >= threshold)
    above = key > threshold
    equal = (key == threshold).to(tl.int32)
    room = N - tl.sum(above.to(tl.int32), axis=1)[:, None]
    return inside & (above | ((equal > 0) & (_running_sum(equal, P) <= room)))


@triton.jit
def _keep_of_row(key, inside, N, BITS: tl.constexpr):
    """Mask of the N highest keys of the whole tile, lower channels first: the N-th highest is found bit by bit from the top."""
    key = tl.where(inside, key.to(tl.int32), -1)
    threshold = tl.full((), 0, tl.int32)
    for step in range(BITS):
        candidate = threshold | (1 << (BITS - 1 - step))
        threshold = tl.where(_total((key >= candidate).to(tl.int32)) >= N, candidate, threshold)
    above = key > threshold
    equal = (key == threshold).to(tl.int32)
    room = N - _total(above.to(tl.int32))
    of_group = tl.sum(equal, axis=1)
    before = tl.cumsum(of_group, axis=0) - of_group
    order = before[:, None] + tl.cumsum(equal, axis=1)
    return above | ((equal > 0) & (order <= room))


@triton.jit
def _median(pattern, inside, size, KIND: tl.constexpr):
    """fp32 value of the lower of the two middle values; NaN if one is in the row; never −0."""
    BITS: tl.constexpr = 32 if KIND == 2 else 16
    SIGN: tl.constexpr = 1 << (BITS - 1)
    bits = pattern.to(tl.uint32, bitcast=True) if KIND == 2 else pattern.to(tl.uint16, bitcast=True).to(tl.uint32)
    order = tl.where((bits & SIGN) != 0, bits ^ (2 * SIGN - 1), bits | SIGN)
    order = tl.where(inside, order, 2 * SIGN - 1)  # never below a candidate
    rank = (size - 1) // 2
    found = tl.full((), 0, tl.uint32)
    for step in range(BITS):
        candidate = found | (tl.full((), SIGN, tl.uint32) >> step)
        found = tl.where(_total((order < candidate).to(tl.int32)) <= rank, candidate, found)
    value = tl.where((found & SIGN) != 0, found & (SIGN - 1), found ^ (2 * SIGN - 1))
    if KIND == 2:
        eta = value.to(tl.float32, bitcast=True)
    else:
        eta = _to_float(value.to(tl.uint16).to(tl.int16, bitcast=True), KIND)
    number = _to_float(pattern, KIND)
    nans = _total((inside & (number != number)).to(tl.int32))
    return tl.where(nans > 0, float("nan"), eta + 0.0)


@triton.jit
def _mean(pattern, inside, size, KIND: tl.constexpr):
    """fp32 value of the mean, rounded to the kind, in the order-free arithmetic of reference.token_mean; never −0."""
    value = tl.where(inside, _to_float(pattern, KIND), 0.0)
    # as bits: a maximum of floats would drop NaN
    peak_bits = tl.max(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    peak = peak_bits.to(tl.float32, bitcast=True).to(tl.float64)
    power = (peak.to(tl.int64, bitcast=True) & (0x7FF << 52)).to(tl.float64, bitcast=True)
    wide = value.to(tl.float64)
    magic = power * 196608.0  # 3·2¹⁶
    on_grid = tl.where(peak_bits < 0x7F800000, (wide + magic) - magic, wide)
    mean = (_total(on_grid) / size.to(tl.float64)).to(tl.float32)
    return _to_float(_from_float(mean, KIND), KIND) + 0.0


@triton.jit
def _variance_ratio(z, first, kept, inside, size):
    """ν of one token of which at least one channel is pruned, so that Var k⊙z is 0 only if k⊙z is."""
    shifted = tl.where(inside, z.to(tl.float64) - first.to(tl.float64), 0.0)
    sparse = tl.where(kept, z, 0.0).to(tl.float64)
    n = size.to(tl.float64)
    shifted_sum, sparse_sum = _total(shifted), _total(sparse)
    dense_variance = _total(shifted * shifted) - shifted_sum * shifted_sum / n
    sparse_variance = _total(sparse * sparse) - sparse_sum * sparse_sum / n
    ratio = dense_variance / tl.where(sparse_variance == 0, 1.0, sparse_variance)
    nu = tl.sqrt(ratio).to(tl.float32)
    return tl.where((dense_variance == 0) | (sparse_variance == 0), 1.0, nu)


# ---- kernels -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _flat_kernel(
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
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    valid = group < n_groups
    inside = valid[:, None] & (tl.arange(0, P) < M)[None, :]
    base = group * M
    x = _load(x_ptr, base, valid, 0, M, P, PIECE)
    row = group // groups_per_row
    start = (group - row * groups_per_row) * M
    if eta_ptr is None:
        eta = 0.0
        fill = 0
    elif VECTOR:
        eta = _load(eta_ptr, start, valid, 0.0, M, P, PIECE)
        fill = _from_float(eta, KIND)
    else:
        eta = tl.load(eta_ptr)
        fill = _from_float(eta, KIND)
    if weight_ptr is None and eta_ptr is None and KIND < 2:
        key = _magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = _load(weight_ptr, row // rows_per_weight * (groups_per_row * M) + start, valid, 0.0, M, P, PIECE)
        key = _score(_to_float(x, KIND) - eta, weight)
    kept = _keep_of_groups(key, inside, N, P)
    _store(u_ptr, base, valid, tl.where(kept, x, fill).to(x.dtype), M, P, PIECE)
    if mask_ptr is not None:
        _store(mask_ptr, base, valid, kept.to(tl.int8), M, P, PIECE)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, _total(kept.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, _total(inside.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def _row_kernel(
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
        x = _load(x_ptr, base, valid, 0, WIDTH, P, PIECE)
    if STAT == 1:
        eta = _median(x, inside, hidden, KIND)
    elif STAT == 2:
        eta = _mean(x, inside, hidden, KIND)
    elif eta_ptr is None:
        eta = 0.0
    elif VECTOR:
        eta = tl.load(eta_ptr + channel, mask=inside, other=0.0)
    else:
        eta = tl.load(eta_ptr)
    z = _to_float(x, KIND) - eta
    if STAT == 0 and eta_ptr is None and weight_ptr is None and KIND < 2:
        key = _magnitude(x, KIND)
    else:
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row // rows_per_weight * hidden + channel, mask=inside, other=0.0)
        key = _score(z, weight)
    if THRESHOLD:
        kept = _keep_of_row(key, inside, N, key.dtype.primitive_bitwidth - 1)
    else:
        kept = _keep_of_groups(key, inside, N, P)
    fill = 0
    if STAT > 0 or eta_ptr is not None:
        fill = _from_float(eta, KIND)
    value = x
    if VAR:
        first = tl.load(x_ptr + row * hidden)
        if eta_ptr is not None:
            first_z = _to_float(first, KIND) - tl.load(eta_ptr)
        else:
            first_z = _to_float(first, KIND) - eta
        nu = _variance_ratio(z, first_z, kept, inside, hidden)
        if nu_ptr is not None:
            tl.store(nu_ptr + row, nu)
        rescaled = _from_float(_to_float(x, KIND) + (nu - 1.0) * z, KIND)
        value = tl.where(nu == 1.0, x, rescaled)
    result = tl.where(kept, value, fill).to(x.dtype)
    if THRESHOLD:
        tl.store(u_ptr + row * hidden + channel, result, mask=inside)
    else:
        _store(u_ptr, base, valid, result, WIDTH, P, PIECE)
    if mask_ptr is not None:
        tl.store(mask_ptr + row * hidden + channel, kept.to(tl.int8), mask=inside)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr, _total(kept.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, hidden.to(tl.int64), sem="relaxed")
