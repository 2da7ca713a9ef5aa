"""The fused primitive *centre, score, keep, rescale*: one call makes the sparse input of a linear layer.

`prune` picks the backend by device: Triton on CUDA, numba on the CPU, plain torch elsewhere. All make the same mask from the same input.
`sparsity/formula.py` has the formula, `reference.py` its arithmetic to the bit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from nmsweep.kernels.arguments import check
from nmsweep.kernels.dispatch import BACKENDS, add_counts, run
from nmsweep.kernels.operator import Prune
from nmsweep.kernels.reference import make

__all__ = ["BACKENDS", "add_counts", "prune", "prune_with_mask"]


def prune(
    x: Tensor,
    *,
    n: int | None = None,
    m: int | None = None,
    kept: int | None = None,
    weight: Tensor | None = None,
    eta: Tensor | Literal["median", "mean"] | None = None,
    var: bool = False,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    counts: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Prune `x` in one fused operation. `x` is never modified.

    The gradient is straight-through: mask, ν and a per-token η are constants, so du/dx is ν on kept channels and 0 on pruned ones;
    an η tensor gets 1 from each pruned channel and 1 − ν from each kept one.

    Args:
        x: [*, hidden], floating; rows are tokens. Any strides, zero tokens allowed.
        n, m: keep exactly n of each m consecutive channels; hidden must be a multiple of m.
        kept: keep exactly this many channels of each token, instead of n of m.
        weight: criterion weight ≥ 0, higher is kept: [hidden], [batch, hidden] for x [batch, tokens, hidden], or the shape of x;
            fp32 (float64 for float64 x). None is 1.
        eta: centre and fill. None is 0; "median" and "mean" are taken over each token; a tensor is a scalar or [hidden].
        var: rescale kept channels by ν, which restores the variance of the dense token.
        scale, gain: prune x · scale · gain instead of x; the product is computed in the same pass and never written. With scale
            [*, 1] fp32 (float64 for float64 x), the last step of a norm, gain is [hidden] in the dtype of x, to which x · scale is
            rounded before, or in fp32. Without scale, for silu(gate) · up, gain has the shape and dtype of x.
        counts: int64 [2] on the device of x; add the kept and the total channels to it, counted from the mask, without a sync.
        mask: bool, contiguous, shape and device of x; write the mask into it.
        backend: one of BACKENDS, instead of the choice by device. The environment variable NMSWEEP_KERNEL does the same.

    Returns:
        u, shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes that do not fit, or a budget that cannot be met.
        InputError: the backend does not exist or cannot run this call.
    """
    if kept is None:
        if n is None or m is None:
            raise ValueError(f"prune: n={n}, m={m}, kept={kept}; give n and m, or kept")
        kept = 0
    elif n is not None or m is not None:
        raise ValueError(f"prune: n={n}, m={m}, kept={kept}; give n and m, or kept, not both")
    elif kept <= 0:
        raise ValueError(f"prune: kept={kept}; at least 1 channel must be kept")
    stat, eta_tensor = ("none", eta) if isinstance(eta, Tensor) else (eta or "none", None)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, scale, gain, eta_tensor)
    )
    if needs_grad:
        args = check(make(x, scale, gain), n or 0, m or 0, kept, weight, stat, eta_tensor, var)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask
        u: Tensor = Prune.apply(args.x, eta_tensor, args, backend, mask)  # type: ignore[no-untyped-call]
        if counts is not None:
            add_counts(mask, counts)
        return u
    args = check(x, n or 0, m or 0, kept, weight, stat, eta_tensor, var, scale, gain)
    return run(args, backend, mask=mask, counts=counts)


def prune_with_mask(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return u of `prune` with the same options, and the mask: bool, shape of x."""
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return prune(x, mask=mask, **options), mask
