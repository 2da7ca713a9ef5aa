"""The primitive on CPU: compiled by numba, run by the threads that torch already has.

Magnitude alone takes one pass over memory (`plain`). Everything else goes chunk by chunk of whole tokens through scratch that stays
in cache (`general`): η of each token, keys, masks, ν, result. Keys are integers: the bit pattern of a float ≥ 0 is monotonic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from nmsweep.kernels.arguments import Arguments
from nmsweep.kernels.cpu.rows import general, layout, plain
from nmsweep.kernels.cpu.select import LARGEST_M, block_kernel, block_size, compiled, source_stamp, wide_kernel

_STORAGE = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_CENTRES = {"none": 0, "median": 1, "mean": 2}
_CHUNK = 4096  # elements: the keys and masks of a chunk stay in the second-level cache
_ALONE = 16384  # elements below which waking a second thread costs more than it saves

_FIELDS = [
    "next_chunk",
    "kept",
    "threads",
    "n_chunks",
    "chunk",
    "x",
    "u",
    "hidden",
    "n",
    "m",
    "padded_m",
    "select",
    "block",
    "weight",
    "rows_per_weight",
    "centre",
    "eta",
    "eta_bits",
    "eta_step",
    "infinity",
    "var",
    "made",
    "scale",
    "gain",
    "gain_step",
    "wide_gain",
    "mask",
    "nu",
    "scratch",
    "total",
]  # the first three are shared by the threads; `chunk` is rows, or blocks in plain; `total` is rows, or elements


class _Call(ctypes.Structure):
    """One call as compiled code reads it: addresses (0 where absent), sizes and choices."""

    _fields_ = [(name, ctypes.c_int64) for name in _FIELDS]


_RECORD = numba.from_dtype(np.dtype([(name, np.int64) for name in _FIELDS]))
_BODY = types.void(types.CPointer(_RECORD))


def supports(args: Arguments) -> bool:
    """Whether this backend can run the call; else the reference does."""
    return args.x.dtype in _STORAGE and args.x.device.type == "cpu"


def prune(
    args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """u of one call; `mask` bool [*, hidden] and `nu` fp32 [*, 1] are filled and `counts` int64 [2] is added to, where given."""
    x = args.x if args.x.is_contiguous() else args.x.contiguous()
    u = torch.empty_like(x)
    n, m, dtype, total = args.n, args.m, x.dtype, x.numel()
    bits = 8 * x.element_size()
    call = _Call(x=x.data_ptr(), u=u.data_ptr(), hidden=x.shape[-1], n=n, m=m, infinity=_INFINITY[dtype])
    parts = _bind_parts(call, args)  # noqa: F841  what the addresses in `call` point to
    magnitude = args.weight is None and args.eta is None and args.stat == "none"
    network = m <= LARGEST_M
    if magnitude and network and m & (m - 1) == 0 and mask is None and not args.var:
        call.block = block_size(m, bits)
        call.select = _address(n, m, bits, call.infinity)
        call.total = total
        call.chunk = max(1, 2 * _CHUNK // call.block)
        call.n_chunks = -(-total // (call.chunk * call.block))
        body = _plain_body(_STORAGE[dtype])
    else:
        hidden = x.shape[-1]
        narrow = magnitude and bits == 16
        held = _bind(call, args)  # noqa: F841  what the addresses in `call` point to
        call.total, call.var = total // hidden, args.var
        call.padded_m, call.block = m, 1
        if network:
            call.padded_m = 1 << (m - 1).bit_length()
            call.block = block_size(call.padded_m, 16)
            call.select = _address(n, call.padded_m, 16, -bits) if narrow else _wide_address(n, call.padded_m, bits)
        call.mask = mask.data_ptr() if mask is not None else 0
        call.nu = nu.data_ptr() if nu is not None else 0
        call.chunk = max(1, _CHUNK // hidden)
        call.n_chunks = -(-call.total // call.chunk)
        size = layout(hidden, m, call.padded_m, call.block, call.chunk, 2 if narrow else 4, bits // 8)[-1]
        scratch = torch.empty(_threads(total, call) * size, dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        body = _general_body(
            _STORAGE[dtype], np.uint16 if bits == 16 else np.uint32, np.uint16 if narrow else np.uint32
        )
    _run(body, call, _threads(total, call))
    if counts is not None:
        counted = counts.numpy()  # sooner than four operations of torch
        counted[0] += call.kept
        counted[1] += total
    return u


def _threads(total: int, call: _Call) -> int:
    return 1 if total < _ALONE else min(torch.get_num_threads(), call.n_chunks)


def _bind(call: _Call, args: Arguments) -> list[Tensor]:
    """Put weight and η into the call; the tensors that must outlive it."""
    call.centre = _CENTRES[args.stat]
    hold: list[Tensor] = []
    if args.weight is not None:
        weight = args.weight.to(torch.float32).contiguous()
        call.weight = weight.data_ptr()
        call.rows_per_weight = args.rows_per_weight if weight.ndim == 2 else args.x.numel()
        hold.append(weight)
    if args.eta is not None:
        patterns = (args.eta.detach().to(args.x.dtype) + 0.0).contiguous()
        values = patterns.to(torch.float32)
        call.eta, call.eta_bits, call.eta_step = values.data_ptr(), patterns.data_ptr(), int(values.numel() > 1)
        hold += [patterns, values]
    return hold


def _bind_parts(call: _Call, args: Arguments) -> list[Tensor]:
    """Put what x is made of into the call; the tensors that must outlive it."""
    hold: list[Tensor] = []
    if args.scale is not None:
        hold.append(args.scale.contiguous())
        call.made, call.scale = 1, hold[-1].data_ptr()
    if args.gain is not None:
        gain = args.gain.detach().contiguous()
        hold.append(gain)
        call.made = 1
        if gain.dtype == args.x.dtype:
            call.gain, call.gain_step = gain.data_ptr(), int(gain.ndim > 1)
        else:
            call.wide_gain = gain.data_ptr()
    return hold


@cache
def _address(n: int, m: int, bits: int, infinity: int) -> int:
    return int(block_kernel(n, m, bits, infinity).address)


@cache
def _wide_address(n: int, m: int, bits: int) -> int:
    return int(wide_kernel(n, m, bits).address)


@cache
def _plain_body(storage: Any) -> Any:
    stamp = source_stamp()

    def run(p: Any) -> None:
        plain(p, storage, stamp)

    return compiled(_BODY, run).ctypes


@cache
def _general_body(storage: Any, unsigned: Any, key_type: Any) -> Any:
    stamp = source_stamp()

    def run(p: Any) -> None:
        general(p, storage, unsigned, key_type, stamp)

    return compiled(_BODY, run).ctypes


def _run(body: Any, call: _Call, n_threads: int) -> None:
    """Run one body on n threads, which take chunks from `call` until none is left."""
    if n_threads <= 1:
        body(ctypes.addressof(call))
    else:
        _team()(body, call, n_threads)


@cache
def _team() -> Callable[[Any, _Call, int], None]:
    """The way to run on many threads: torch's own OpenMP team, already awake between two matmuls; else a pool of Python threads."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that it links
    except (OSError, AttributeError):
        pool = ThreadPoolExecutor(torch.get_num_threads())
        return lambda body, call, n: list(pool.map(body, [ctypes.addressof(call)] * n)).clear()
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda body, call, n: parallel(body, ctypes.addressof(call), n, 0)
