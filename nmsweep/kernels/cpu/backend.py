"""The CPU backend: hands tensors to the compiled kernel, on the threads that torch already has."""

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
from nmsweep.kernels.cpu.kernel import (
    CALL,
    LARGEST_M,
    MEAN,
    MEDIAN,
    NO_CENTRE,
    OF_CHANNELS,
    OF_TOKENS,
    POINTERS,
    kernel,
)

_PATTERNS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
_CHUNK = 4096  # elements: the scratch of a chunk stays in the second-level cache
_ALONE = 16384  # elements below which waking a second thread costs more than it saves


def supports(args: Arguments) -> bool:
    """Return whether this backend can run the call; else the reference does."""
    return args.x.dtype in (*_PATTERNS, torch.float16) and args.x.device.type == "cpu"


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Return u of one call; fill `mask` bool [*, hidden] and `nu` fp32 [*, 1] and add to `counts` int64 [2], where given."""
    if args.x.dtype == torch.float16:
        return prune(_widened(args), mask=mask, nu=nu, counts=counts).half()
    x = args.x.contiguous()
    u = torch.empty_like(x)
    hidden, dtype = x.shape[-1], x.dtype
    rows = x.numel() // hidden
    chunk_rows = max(1, min(_CHUNK // hidden, rows))
    comparators = _comparators(args.n, args.m) if args.m <= LARGEST_M else np.zeros((0, 2), np.int64)
    by_magnitude = dtype == torch.bfloat16 and args.weight is None and args.eta is None and args.stat == "none"

    weight = eta = gain = wide_gain = None
    rows_per_weight = rows
    centre = {"none": NO_CENTRE, "median": MEDIAN, "mean": MEAN}[args.stat]
    if args.weight is not None:
        weight = args.weight.to(torch.float32).contiguous()
        rows_per_weight = args.rows_per_weight if weight.ndim == 2 else rows
    elif not by_magnitude:
        weight = torch.ones(hidden)
    if args.eta is not None:
        of_tokens = args.eta.ndim == x.ndim and args.eta.shape[-1] == 1 < hidden
        centre = OF_TOKENS if of_tokens else OF_CHANNELS
        eta = args.eta.detach().to(dtype) + 0.0
        eta = (eta if of_tokens else eta.expand(hidden)).contiguous()
    if args.gain is not None and args.gain.dtype == dtype:
        gain = args.gain.detach().contiguous()
    elif args.gain is not None:
        wide_gain = args.gain.detach().contiguous()
    scale = None if args.scale is None else args.scale.contiguous()

    call = np.zeros(1, CALL)
    call[0] = (
        rows, hidden, args.n, args.m, chunk_rows, len(comparators), _INFINITY[dtype], rows_per_weight, 0 if gain is None else gain.numel() // hidden, centre,
        args.var, scale is not None, wide_gain is not None, mask is not None, nu is not None,
    )  # fmt: skip
    shared = np.zeros(2, np.int64)  # the next chunk; channels kept
    addresses = [call.ctypes.data, shared.ctypes.data, shared.ctypes.data + 8]
    addresses += [0 if tensor is None else tensor.data_ptr() for tensor in (x, u, scale, gain, wide_gain, weight, eta, mask, nu)]
    pointers = (ctypes.c_void_p * len(POINTERS))(*addresses, comparators.ctypes.data)
    n_threads = 1 if x.numel() < _ALONE else min(torch.get_num_threads(), -(-rows // chunk_rows))
    _call(kernel(_PATTERNS[dtype], np.uint16 if by_magnitude else np.uint32).ctypes, ctypes.addressof(pointers), n_threads)
    if counts is not None:
        counts += torch.tensor([shared[1], x.numel()])
    return u


def _widened(args: Arguments) -> Arguments:
    """Return a call on float16 as one on float32, which holds the same values; what is rounded to float16 is made before."""
    x = reference.make(args.x, args.scale, args.gain)
    eta = reference.centre(x, args.stat, args.eta) if args.stat == "mean" or args.eta is not None else None
    stat = "median" if args.stat == "median" else "none"
    return Arguments(x.float(), args.n, args.m, args.weight, args.rows_per_weight, stat, eta, args.var)


@cache
def _comparators(n: int, m: int) -> np.ndarray:
    """Return Batcher's odd-even merge sort of m keys, descending, without what does not reach the n-th: int64 [comparators, 2]."""
    size = 1 << (m - 1).bit_length()  # keys from m on would be the lowest and stay where they are
    network = []
    p = 1
    while p < size:
        k = p
        while k:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p) and i + j + k < m:
                        network.append((i + j, i + j + k))
            k //= 2
        p *= 2
    needed, used = {n - 1}, []
    for pair in reversed(network):
        if needed.intersection(pair):
            needed.update(pair)
            used.append(pair)
    return np.array(used[::-1], np.int64).reshape(-1, 2)


def _call(function: Any, pointers: int, n_threads: int) -> None:
    """Call a kernel on n threads, which take chunks of the call until none is left."""
    if n_threads <= 1:
        function(ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p)))
    else:
        _team()(function, pointers, n_threads)


@cache
def _team() -> Callable[[Any, int, int], None]:
    """Return a way to call on many threads: torch's OpenMP team, already awake between two products; else Python threads."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that it links
    except (OSError, AttributeError):
        pool = ThreadPoolExecutor(torch.get_num_threads())
        return lambda function, pointers, n: list(pool.map(function, [pointers] * n)).clear()
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda function, pointers, n: parallel(function, pointers, n, 0)
