"""The CPU backend: hand tensors to the compiled kernel, on the threads of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmsweep.kernels import reference
from nmsweep.kernels.arguments import Arguments
from nmsweep.kernels.cpu.kernel import CALL, CENTRES, POINTERS, kernel

_PATTERNS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
_CHUNK = 8192  # elements: the scratch of a chunk stays in the second-level cache
_ALONE = 16384  # elements below which a second thread costs more than it saves


def supports(args: Arguments) -> bool:
    """Return whether this backend can run the call; else the reference does."""
    return args.x.dtype in (*_PATTERNS, torch.float16) and args.x.device.type == "cpu"


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Return u of one call; fill `mask` bool [*, hidden] and `nu` fp32 [*, 1] and add to `counts` int64 [2], where given."""
    if args.x.dtype == torch.float16:
        return prune(_as_float32(args), mask=mask, nu=nu, counts=counts).half()
    x = args.x.contiguous()
    u = torch.empty_like(x)
    hidden, total, dtype = x.shape[-1], x.numel(), x.dtype
    rows = total // hidden
    chunk_rows = min(max(1, _CHUNK // hidden), rows)
    by_magnitude = dtype == torch.bfloat16 and args.weight is None and args.eta is None and args.stat == "none"
    weight, rows_per_weight = (None, 1) if by_magnitude else _weight(args, rows)
    eta, centre = _centre(args, x)
    gain = None if args.gain is None else args.gain.detach().contiguous()
    wide = gain is not None and gain.dtype != dtype
    scale = None if args.scale is None else args.scale.contiguous()
    call = (ctypes.c_int64 * len(CALL))(
        rows, hidden, args.n, args.m, chunk_rows, _INFINITY[dtype], rows_per_weight, centre, args.var, scale is not None,
        0 if gain is None or wide else gain.numel() // hidden, wide, mask is not None, nu is not None,
    )  # fmt: skip
    shared = (ctypes.c_int64 * 2)()  # the next chunk; channels kept
    tensors = (x, u, scale, None if wide else gain, gain if wide else None, weight, eta, mask, nu)
    pointers = (ctypes.c_void_p * len(POINTERS))(
        ctypes.addressof(call), ctypes.addressof(shared), ctypes.addressof(shared) + 8,
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
    )  # fmt: skip
    n_threads = 1 if total < _ALONE else min(torch.get_num_threads(), -(-rows // chunk_rows))
    _run(kernel(_PATTERNS[dtype], np.uint16 if by_magnitude else np.uint32).ctypes, pointers, n_threads)
    if counts is not None:
        counted = counts.numpy()  # faster than operations of torch
        counted[0] += shared[1]
        counted[1] += total
    return u


def _weight(args: Arguments, rows: int) -> tuple[Tensor, int]:
    """Return the weight, fp32 [k, hidden], and how many rows of x share one of its rows."""
    if args.weight is None:
        return torch.ones(args.x.shape[-1]), rows
    return args.weight.to(torch.float32).contiguous(), rows if args.weight.ndim == 1 else args.rows_per_weight


def _centre(args: Arguments, x: Tensor) -> tuple[Tensor | None, int]:
    """Return η in the dtype of x, [hidden] or a number for each token, and how the kernel takes it."""
    if args.eta is None:
        return None, CENTRES.index(args.stat)
    eta = args.eta.detach().to(x.dtype) + 0.0
    if eta.shape == (*x.shape[:-1], 1):
        return eta.contiguous(), CENTRES.index("tokens")
    return eta.reshape(-1).expand(x.shape[-1]).contiguous(), CENTRES.index("channels")


def _as_float32(args: Arguments) -> Arguments:
    """Return a call on float16 as one on float32; what has to be rounded to float16 is computed here."""
    x = reference.make(args.x, args.scale, args.gain)
    eta = reference.centre(x, args.stat, args.eta) if args.stat == "mean" or args.eta is not None else None
    stat = "median" if args.stat == "median" else "none"
    return Arguments(x.float(), args.n, args.m, args.weight, args.rows_per_weight, stat, eta, args.var)


def _run(function: Any, pointers: Any, n_threads: int) -> None:
    """Call a kernel on n threads, which share the chunks of the call."""
    if n_threads <= 1:
        function(pointers)
    else:
        _team()(function, ctypes.addressof(pointers), n_threads)


@cache
def _team() -> Callable[[Any, int, int], None]:
    """Return how to call a kernel on many threads: on torch's OpenMP team, which is awake between two products, else on Python threads."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # found in the libraries that it links
    except (OSError, AttributeError):
        pool = ThreadPoolExecutor(torch.get_num_threads())
        return lambda function, pointers, n: list(pool.map(function, [pointers] * n)).clear()
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda function, pointers, n: parallel(function, pointers, n, 0)
