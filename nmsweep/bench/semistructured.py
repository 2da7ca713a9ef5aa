"""Time real 2:4 hardware against the dense product: sparse tensor cores with the activations as the sparse operand, packing included."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.bench.options import Count, Device, Dtype
from nmsweep.bench.timing import Contender, interleave, median_ms, ratios
from nmsweep.errors import InputError
from nmsweep.kernels import prune

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""(in, out) of the linear layers of an 8B Llama: q and o, k and v, gate and up, down."""


def run(
    *, device: Device = "auto", dtype: Dtype = "bfloat16", tokens: Count = 8192, rounds: Count = 7
) -> list[dict[str, Any]]:
    """Time y = x Wᵀ for x [tokens, in] pruned 2:4: dense, masked dense, and sparse with cuSPARSELt; with torchao also in fp8.

    Returns:
        One row a layer and kernel (`cusparselt` in the given dtype, or `torchao fp8`), as ratios to the dense product in the
        given dtype, for fp8 too. Below 1 is a gain.

        - `masked`: prune and dense product, which is how nmsweep simulates sparsity;
        - `matmul`: the sparse product alone, of a packed operand; `pack`: packing alone;
        - `sparse`: prune, pack and sparse product, which is what the hardware offers; with its quartiles;
        - `dense_fp8`: quantisation and dense fp8 product; `matmul_fp8`: that product alone;
        - `max_difference`: between the sparse and the dense product of one operand, in units of the largest weight.

    Raises:
        InputError: the device has no sparse tensor cores.
    """
    if not device.startswith("cuda"):
        raise InputError("bench semistructured: it needs sparse tensor cores; run it on an NVIDIA GPU from Ampere on")
    rows = []
    for width, n_out in SHAPES:
        x = torch.randn(tokens, width, device=device).to(getattr(torch, dtype))
        weight = (torch.randn(n_out, width, device=device) * width**-0.5).to(x.dtype)
        shape = {"in": width, "out": n_out, "tokens": tokens}
        with torch.inference_mode():
            rows.append({**shape, "kernel": "cusparselt", **_compare(x, weight, device, rounds)})
            if importlib.util.find_spec("torchao") is not None:
                rows.append({**shape, "kernel": "torchao fp8", **_compare_fp8(x, weight, device, rounds)})
    return rows


def _compare(x: Tensor, weight: Tensor, device: str, rounds: int) -> dict[str, Any]:
    pack = torch.sparse.to_sparse_semi_structured
    pruned = prune(x, n=2, m=4)
    packed = pack(pruned)
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": partial(F.linear, x, weight),
        "masked": lambda: F.linear(prune(x, n=2, m=4), weight),
        "matmul": lambda: torch.mm(packed, weight.t()),
        "pack": partial(pack, pruned),
        "sparse": lambda: torch.mm(pack(prune(x, n=2, m=4)), weight.t()),
    }
    difference = (calls["matmul"]() - F.linear(pruned, weight)).abs().max() / weight.abs().max()
    return _row(calls, float(difference), device, rounds)


def _compare_fp8(x: Tensor, weight: Tensor, device: str, rounds: int) -> dict[str, Any]:
    """Time torchao's kernels for compute capability 9.0. They take a sparse weight, so x takes its place: yᵀ = W xᵀ."""
    from torchao.ops import rowwise_scaled_linear_sparse_cutlass_f8f8, to_sparse_semi_structured_cutlass_sm9x_f8

    w8, w_scale = _quantised(weight)

    def pack() -> tuple[Tensor, ...]:
        values, scale = _quantised(prune(x, n=2, m=4))
        return (*to_sparse_semi_structured_cutlass_sm9x_f8(values), scale)

    def sparse_product(packed: tuple[Tensor, ...]) -> Tensor:
        y: Tensor = rowwise_scaled_linear_sparse_cutlass_f8f8(w8, w_scale, *packed, None, x.dtype)
        return y.t()

    def dense_product(values: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            values, w8.t(), scale_a=scale[:, None], scale_b=w_scale[None], out_dtype=x.dtype, use_fast_accum=True
        )

    pruned = _quantised(prune(x, n=2, m=4))
    packed = pack()
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": partial(F.linear, x, weight),
        "dense_fp8": lambda: dense_product(*_quantised(x)),
        "matmul_fp8": partial(dense_product, *pruned),
        "matmul": partial(sparse_product, packed),
        "pack": lambda: to_sparse_semi_structured_cutlass_sm9x_f8(pruned[0])[0],
        "sparse": lambda: sparse_product(pack()),
    }
    difference = (calls["matmul"]() - calls["matmul_fp8"]()).abs().max() / weight.abs().max()
    return _row(calls, float(difference), device, rounds)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in fp8 (e4m3) and the fp32 scale of each row."""
    scale = x.abs().amax(dim=1).float().clamp(min=1e-12) / 448.0
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale


def _row(calls: dict[str, Callable[[], Tensor]], difference: float, device: str, rounds: int) -> dict[str, Any]:
    times = interleave({name: Contender(call, repeats=5) for name, call in calls.items()}, device, rounds)
    quartiles = ratios(times, "dense")
    return {
        "dense_ms": median_ms(times["dense"]),
        **{name: quartiles[name][0] for name in calls if name != "dense"},
        "sparse_q1": quartiles["sparse"][1],
        "sparse_q3": quartiles["sparse"][2],
        "max_difference": difference,
        "rounds": rounds,
    }
