"""The primitive on CUDA, in Triton: choose the kernel of a call and its tile.

x · scale · gain is computed where it is read if it is read once, else by `make_kernel` before. `centre_kernel` or `packed_median_kernel`
computes the median or mean of the tokens. Then `packed_kernel` and `packed_row_kernel` serve 16-bit values by magnitude alone, `scaled_kernel` calls with ν,
`row_kernel` those without groups and `flat_kernel` all others. In each, a thread holds whole groups in its registers. Bit patterns are
passed as integers, so kept channels stay bit for bit. Under TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from nmsweep.kernels.arguments import Arguments
from nmsweep.kernels.triton.kernels import centre_kernel, flat_kernel, packed_median_kernel, row_kernel, scaled_kernel
from nmsweep.kernels.triton.numbers import EMULATE
from nmsweep.kernels.triton.packed import packed_kernel, packed_row_kernel
from nmsweep.kernels.triton.parts import make_kernel

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_STATS = {"none": 0, "median": 1, "mean": 2}
_LARGEST_M = 64
_LARGEST_STREAM = 2**31 - 2**16  # groups that a 32-bit number can count, with room for the last program
_LARGEST_ROW = 65536  # channels of a token that one program can hold
_PIECE_BYTES = 16  # the widest load of a thread
_CENTRE_GROUP = 8  # consecutive channels of a thread of centre_kernel

_NAN_KEYS = {torch.bfloat16: 0x7F817F81, torch.float16: 0x7C017C01}

PACKED_CONFIGS = {2: (1024, 4), 4: (1024, 8), 8: (1024, 8), 16: (256, 8), 32: (256, 8), 64: (64, 2)}
"""(groups per program, warps) of packed_kernel by M: the fastest on an H200 among those large enough to make counting cheap."""

FLAT_CONFIGS = {1: (2048, 4), 2: (1024, 4), 4: (512, 4), 8: (512, 4), 16: (256, 4), 32: (128, 4), 64: (64, 2)}
"""(groups per program, warps) of flat_kernel by M, rounded up to a power of two."""

SCALED_CONFIG = (2048, 4)
"""(channels that scaled_kernel holds at once, more if a thread could not hold a group; warps)."""

MAKE_BLOCK = 2048
"""Channels of a token per program of make_kernel."""

CENTRE_WARP = 1024
"""Channels of a token per warp of centre_kernel."""

ROW_WARPS, ROW_BLOCK = 4, 2048
"""Minimum of warps of row_kernel and maximum of channels that it writes at once: the fastest on an H200."""

SELECT_WARP = 2048
"""Words of a token per warp while the k-th lowest is searched."""


@cache
def _knows_words(device: torch.device) -> bool:
    """Return whether a GPU has instructions on two 16-bit numbers at once, that is, compute capability 9.0 or higher."""
    return EMULATE.value or torch.cuda.get_device_capability(device) >= (9, 0)


def supports(args: Arguments) -> bool:
    """Return whether this backend can run the call; else the reference does. ROCm lacks some of the instructions."""
    if (
        not ((args.x.is_cuda and torch.version.hip is None) or EMULATE.value)
        or args.x.dtype not in _KINDS
        or args.x.numel() // args.m > _LARGEST_STREAM
    ):
        return False
    hidden, per_token = args.x.shape[-1], args.stat != "none" or args.var
    return (args.m <= _LARGEST_M and not per_token) or (
        hidden <= _LARGEST_ROW and args.m in (*range(_LARGEST_M + 1), hidden)
    )


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Return u; fill `mask` bool [*, hidden] and `nu` fp32 [*, 1] and add to `counts` int64 [2], where given."""
    x = args.x.contiguous()
    packs = mask is None and _packs(args, x)
    if args.has_parts and not packs and (args.var or args.stat != "none" or args.m > _LARGEST_M):
        x = _make(args, x)
        args = replace(args, x=x, scale=None, gain=None)
    u = torch.empty_like(x)
    if packs:
        with torch.cuda.device_of(x):
            _launch_packed(x, u, args, counts)
        return u
    hidden, n, m = x.shape[-1], args.n, args.m
    pattern = _PATTERNS[x.dtype]
    weight = None if args.weight is None else args.weight.to(device=x.device, dtype=torch.float32).contiguous()
    with torch.cuda.device_of(x):
        eta, kind = _centre(args, x)
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
            "ETA": kind,
            "PIECE": _PIECE_BYTES // x.element_size(),
            "enable_fp_fusion": False,  # every rounding of the formula is a rounding
        }
        if m > _LARGEST_M:
            _launch_row(common, x.numel() // hidden, hidden, args.var, nu)
        elif args.var:
            _launch_scaled(common, x.numel() // hidden, hidden, nu)
        else:
            _launch_flat({**common, **_parts(args)}, x.numel() // m, hidden // m)
    return u


def _parts(args: Arguments, words: bool = False) -> dict[str, Any]:
    """Return scale and gain as kernel arguments; the gain as bit patterns, of two channels each for kernels that read words."""
    gain, kind = args.gain, 0
    if gain is not None:
        kind = 3 if gain.ndim > 1 else 1 if gain.dtype == args.x.dtype else 2
        gain = gain.detach().contiguous().view(-1)
        if words:
            gain = gain.view(torch.int64 if kind == 2 else torch.int32)
        elif kind != 2:
            gain = gain.view(_PATTERNS[gain.dtype])
    scale = None if args.scale is None else args.scale.detach().contiguous()
    return {"scale_ptr": scale, "gain_ptr": gain, "GAIN": kind}


def _make(args: Arguments, x: Tensor) -> Tensor:
    """Write out x · scale · gain."""
    product, pattern, hidden = torch.empty_like(x), _PATTERNS[x.dtype], x.shape[-1]
    with torch.cuda.device_of(x):
        make_kernel[(x.numel() // hidden, triton.cdiv(hidden, MAKE_BLOCK))](
            x.view(pattern), product.view(pattern), hidden=hidden, KIND=_KINDS[x.dtype], B=MAKE_BLOCK,
            num_warps=4, enable_fp_fusion=False, **_parts(args),
        )  # fmt: skip
    return product


def _centre(args: Arguments, x: Tensor) -> tuple[Tensor | None, int]:
    """Return η in fp32, rounded to the dtype of x, and the kernels' ETA."""
    if args.eta is not None:
        eta = (args.eta.detach().to(device=x.device, dtype=x.dtype) + 0.0).to(torch.float32).contiguous()
        return eta, 2 if eta.numel() > 1 else 1
    if args.stat == "none":
        return None, 0
    hidden = x.shape[-1]
    n_rows = x.numel() // hidden
    eta = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if args.stat == "median" and hidden % 2 == 0 and _in_words(x):
        words = triton.next_power_of_2(hidden // 2)
        packed_median_kernel[(n_rows,)](
            x.view(-1).view(torch.int32), eta, hidden, KIND=_KINDS[x.dtype], T=words,
            num_warps=_select_warps(words),
        )  # fmt: skip
    else:
        rows = triton.next_power_of_2(triton.cdiv(hidden, _CENTRE_GROUP))
        centre_kernel[(n_rows,)](
            x.view(_PATTERNS[x.dtype]), eta, hidden, KIND=_KINDS[x.dtype], STAT=_STATS[args.stat], P=_CENTRE_GROUP, G=rows,
            num_warps=min(16, max(4, rows * _CENTRE_GROUP // CENTRE_WARP)), enable_fp_fusion=False,
        )  # fmt: skip
    return eta, 3


def _select_warps(words: int) -> int:
    return min(16, max(1, words // SELECT_WARP))


def _in_words(x: Tensor) -> bool:
    """Return whether the GPU can compute with words of two neighbours of the contiguous x."""
    return x.dtype in _NAN_KEYS and x.storage_offset() % 2 == 0 and _knows_words(x.device)


def _packs(args: Arguments, x: Tensor) -> bool:
    """Return whether a packed kernel can run a call on the contiguous x."""
    by_magnitude = args.weight is None and args.eta is None and args.stat == "none" and not args.var
    alone = args.m == x.shape[-1] and args.m % 2 == 0
    aligned = args.gain is None or args.gain.storage_offset() % 2 == 0
    return by_magnitude and _in_words(x) and aligned and args.n < args.m and (args.m in PACKED_CONFIGS or alone)


def _launch_packed(x: Tensor, u: Tensor, args: Arguments, counts: Tensor | None) -> None:
    x_words, u_words, nan = x.view(-1).view(torch.int32), u.view(-1).view(torch.int32), _NAN_KEYS[x.dtype]
    n_groups = x.numel() // args.m
    common: dict[str, Any] = {
        "x_ptr": x_words, "u_ptr": u_words, "counts_ptr": counts, "N": args.n, "KIND": _KINDS[x.dtype], "NAN": nan,
        **_parts(args, words=True),
    }  # fmt: skip
    if args.m not in PACKED_CONFIGS:
        words = triton.next_power_of_2(args.m // 2)
        packed_row_kernel[(n_groups,)](**common, hidden=args.m, T=words, num_warps=_select_warps(words))
        return
    groups, warps = PACKED_CONFIGS[args.m]
    per_row = x.shape[-1] // args.m if args.has_parts else 1  # a constant, so that dividing by it is cheap
    packed_kernel[(triton.cdiv(n_groups, groups),)](
        **common, n_groups=n_groups, M=args.m, ROW=per_row, G=groups, num_warps=warps
    )


def _launch_flat(common: dict[str, Any], n_groups: int, groups_per_row: int) -> None:
    padded_m = triton.next_power_of_2(common["M"])
    groups, warps = FLAT_CONFIGS[padded_m]
    flat_kernel[(triton.cdiv(n_groups, groups),)](
        **common, n_groups=n_groups, groups_per_row=groups_per_row, P=padded_m, G=groups, num_warps=warps
    )


def _launch_scaled(common: dict[str, Any], n_rows: int, hidden: int, nu: Tensor | None) -> None:
    padded_m = triton.next_power_of_2(common["M"])
    elements, warps = SCALED_CONFIG
    groups = max(elements // padded_m, 32 * warps)  # a thread holds whole groups
    groups = min(groups, triton.next_power_of_2(hidden // common["M"]))
    scaled_kernel[(n_rows,)](**common, nu_ptr=nu, hidden=hidden, P=padded_m, G=groups, num_warps=warps)


def _launch_row(common: dict[str, Any], n_rows: int, hidden: int, var: bool, nu: Tensor | None) -> None:
    names = ("x_ptr", "u_ptr", "weight_ptr", "eta_ptr", "mask_ptr", "counts_ptr", "rows_per_weight", "N", "KIND", "ETA")
    pairs = triton.next_power_of_2(triton.cdiv(hidden, 2))
    row_kernel[(n_rows,)](
        **{name: common[name] for name in names}, nu_ptr=nu, hidden=hidden, VAR=var, T=pairs, B=min(ROW_BLOCK, max(1, pairs // 2)),
        num_warps=max(ROW_WARPS, _select_warps(pairs)), enable_fp_fusion=False,
    )  # fmt: skip
