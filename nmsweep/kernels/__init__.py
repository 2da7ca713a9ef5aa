"""The fused primitive *centre, score, keep, rescale*: one call makes the sparse input of a linear layer (the formula in `sparsity/linear.py`).

`prune` picks the backend by device: Triton on CUDA, numba on CPU, plain torch for the rest. All make the same mask from the same input.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from nmsweep.kernels.arguments import check
from nmsweep.kernels.dispatch import BACKENDS, add_counts, run
from nmsweep.kernels.operator import prune_op
from nmsweep.kernels.reference import make

__all__ = ["BACKENDS", "add_counts", "prune"]


@overload
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
    backend: str | None = None,
    return_mask: Literal[False] = False,
) -> Tensor: ...


@overload
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
    backend: str | None = None,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    backend: str | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prune `x` as one fused operation; `reference.py` states the arithmetic to the bit.

    The gradient is straight-through: mask, ν and a per-token η are constants, so du/dx is ν on kept channels and 0 on pruned ones;
    an η tensor gets 1 from each pruned channel and 1 − ν from each kept one. `x` is never modified.

    Args:
        x: [*, hidden], floating; rows are tokens. Any strides, zero tokens allowed.
        n, m: exactly n kept of each m consecutive channels; hidden is a multiple of m.
        kept: instead of n and m: exactly this many channels kept of each token.
        weight: criterion weight ≥ 0, higher is kept: [hidden], [batch, hidden] for x [batch, tokens, hidden], or the shape of x;
            fp32 (float64 for float64 x). None is 1.
        eta: centre and fill: None is 0, "median" and "mean" are of each token, a tensor is a scalar or [hidden].
        var: rescale kept channels by ν, so that the variance of the token is that of its dense self.
        scale, gain: what is pruned is not x but x · scale · gain, made in the same pass and never written: scale is [*, 1] fp32
            (float64 for float64 x), gain [hidden] in the dtype of x or in fp32, or in the shape and dtype of x. A gain in the
            dtype of x multiplies what was rounded to it before, one in fp32 what was not. This is a norm's last step, or silu(gate) · up.
        counts: int64 [2] on the device of x; kept and total channels are added to it, as counted from the mask, without a sync.
        backend: one of BACKENDS instead of the choice by device; so does the environment variable NMSWEEP_KERNEL.
        return_mask: also return the mask, bool, shape of x.

    Returns:
        u, shape and dtype of x, contiguous; with `return_mask` also the mask.

    Raises:
        ValueError: shapes or a budget without meaning.
        InputError: a backend that does not exist, or cannot run this call.
    """
    if kept is None:
        if n is None or m is None:
            raise ValueError(f"prune: n={n}, m={m}, kept={kept}; give n and m, or kept")
        kept = 0
    elif n is not None or m is not None:
        raise ValueError(f"prune: n={n}, m={m}, kept={kept}; give n and m, or kept, not both")
    elif kept <= 0:
        raise ValueError(f"prune: kept={kept}; at least 1 channel must be kept")
    stat, centre = ("none", eta) if isinstance(eta, Tensor) else (eta or "none", None)
    parts = [part for part in (x, scale, gain, centre) if part is not None]
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if learns or torch.compiler.is_compiling():
        x = make(x, scale, gain)
        saves = learns or return_mask or counts is not None
        u, mask, _ = prune_op(x, n or 0, m or 0, kept, weight, stat, centre, var, backend or "", saves)
        if counts is not None:
            add_counts(mask, counts)
        return (u, mask) if return_mask else u
    args = check(x, n or 0, m or 0, kept, weight, stat, centre, var, scale, gain)
    u, kept_channels, _ = run(args, backend, return_mask, counts)
    return u if kept_channels is None else (u, kept_channels)
