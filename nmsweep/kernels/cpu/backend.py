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
from nmsweep.kernels.cpu.kernel import CALL, POINTERS, kernel

_PATTERNS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}
_CHUNK = 8192  # elements: the scratch of a chunk stays in the second-level cache
_ALONE = 16384  # elements below which a second thread costs more than it saves


def supports(args: Arguments) -> bool:
    """Return whether this backend can run the call; else the reference does."""
    return args.x.dtype in (*_PATTERNS, torch.float16) and args.x.device.type == "cpu"


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Return u of one call; fill `mask` bool [*, hidden] and `nu` fp32 [*, 1] and add to `counts` int64 [2], where given."""
    if args.x.dtype == torch.float16 or args.stat == "mean":
        return prune(_prepared(args), mask=mask, nu=nu, counts=counts).to(args.x.dtype)
    x = args.x.contiguous()
    u = torch.empty_like(x)
    hidden, total, dtype = x.shape[-1], x.numel(), x.dtype
    rows = total // hidden
    chunk_rows = min(max(1, _CHUNK // hidden), rows)
    by_magnitude = dtype == torch.bfloat16 and args.weight is None and args.eta is None and args.stat == "none"
    ones = None if by_magnitude else torch.ones(hidden)
    weight = ones if args.weight is None else args.weight.to(torch.float32).contiguous()
    eta = None if args.eta is None else args.eta.detach().to(dtype) + 0.0
    if eta is not None:
        eta = (eta if eta.ndim == x.ndim else eta.reshape(-1)).expand(x.shape).contiguous()
    gain = None if args.gain is None else args.gain.detach().contiguous()
    wide = gain is not None and gain.dtype != dtype
    scale = None if args.scale is None else args.scale.contiguous()
    call = (ctypes.c_int64 * len(CALL))(
        rows, hidden, args.n, args.m, chunk_rows, args.rows_per_weight, args.stat == "median", args.var, eta is not None,
        gain is not None, scale is not None, wide, mask is not None, nu is not None,
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


def _prepared(args: Arguments) -> Arguments:
    """Return a call without float16 and without the mean: torch makes x and η, rounded to float16, and they pass as float32."""
    x = reference.make(args.x, args.scale, args.gain)
    stat, eta = ("median", None) if args.stat == "median" else ("none", reference.centre(x, args.stat, args.eta))
    x = x.float() if x.dtype == torch.float16 else x
    return Arguments(x, args.n, args.m, args.weight, args.rows_per_weight, stat, eta, args.var)


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
