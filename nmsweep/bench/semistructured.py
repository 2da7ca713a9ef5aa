"""Real 2:4 hardware: sparse tensor cores with the activations as the sparse operand, packing included, against the dense product."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.bench.timing import Contender, interleave, ratios
from nmsweep.sparsity.kernels import prune

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""(in, out) of the linear layers of an 8B Llama: q and o, k and v, gate and up, down."""


def run(
    *, device: str, dtype: torch.dtype, tokens: int, shapes: Sequence[tuple[int, int]] = SHAPES, rounds: int = 7
) -> list[dict[str, Any]]:
    """Time y = x Wᵀ for x [tokens, in] pruned 2:4: dense, masked dense, and sparse with cuSPARSELt.

    Returns:
        one row a layer, ratios to the dense product: `masked` (prune, dense product: what nmsweep measures with), `matmul` (the
        sparse product alone, of a packed operand), `pack` (packing alone), `sparse` (prune, pack and sparse product: what
        hardware gives today), with quartiles of `sparse`; below 1 is a gain. `max_difference`: of the two products, in units of the
        largest weight.
    """
    rows = []
    for width, n_out in shapes:
        x = torch.randn(tokens, width, device=device).to(dtype)
        weight = (torch.randn(n_out, width, device=device) * width**-0.5).to(dtype)
        with torch.inference_mode():
            rows.append({"in": width, "out": n_out, "tokens": tokens, **_compare(x, weight, device, rounds)})
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
    times = interleave({name: Contender(call, repeats=5) for name, call in calls.items()}, device, rounds)
    found = ratios(times, "dense")
    return {
        "dense_ms": 1e3 * times["dense"].median_s,
        **{name: found[name][0] for name in calls if name != "dense"},
        "sparse_q1": found["sparse"][1],
        "sparse_q3": found["sparse"][2],
        "max_difference": float(difference),
        "rounds": rounds,
    }
