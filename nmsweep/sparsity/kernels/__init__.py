"""The fused primitive *centre, score, keep, rescale*: one call makes the sparse input of a linear layer (docs/METHODS.md §1).

`prune` picks the backend by device: Triton on CUDA, numba on CPU, plain torch for the rest. All make the same mask from the same input.
"""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import reference
from .arguments import Arguments, check, compute_dtype

__all__ = ["BACKENDS", "prune"]

BACKENDS = ("reference", "cpu", "triton")
_ENVIRONMENT = "NMSWEEP_KERNEL"  # forces a backend, as backend= does


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
        counts: int64 [2] on the device of x; kept and total channels are added to it, as counted from the mask, without a sync.
        backend: one of BACKENDS instead of the choice by device; so does the environment variable NMSWEEP_KERNEL.
        return_mask: also return the mask, bool, shape of x.

    Returns:
        u, shape and dtype of x, contiguous; with `return_mask` also the mask.

    Raises:
        ValueError: shapes or a budget without meaning.
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
    learns = torch.is_grad_enabled() and (x.requires_grad or (centre is not None and centre.requires_grad))
    if learns or torch.compiler.is_compiling():
        saves = learns or return_mask or counts is not None
        u, mask, _ = _op(x, n or 0, m or 0, kept, weight, stat, centre, var, backend or "", saves)
        if counts is not None:
            _count(mask, counts)
    else:
        args = check(x, n or 0, m or 0, kept, weight, stat, centre, var)
        u, mask, _ = _run(args, backend, return_mask, counts)
    return (u, mask) if return_mask else u


def _count(mask: Tensor, counts: Tensor) -> None:
    counts[0] += mask.sum()
    counts[1] += mask.numel()


def _run(
    args: Arguments, backend: str | None, return_mask: bool, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one checked call on the backend that is asked for, or the fastest that can."""
    if args.x.numel() == 0:
        return (
            torch.empty_like(args.x),
            torch.empty_like(args.x, dtype=torch.bool),
            args.x.new_ones(*args.x.shape[:-1], 1),
        )
    u, mask, nu = reference.prune(args)
    if counts is not None:
        _count(mask, counts)
    return u, mask, nu


@torch.library.custom_op("nmsweep::prune", mutates_args=())
def _op(
    x: Tensor,
    n: int,
    m: int,
    kept: int,
    weight: Tensor | None,
    stat: str,
    eta: Tensor | None,
    var: bool,
    backend: str,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prune` for autograd and torch.compile: u, and with `saves` the mask and ν (else both are empty)."""
    u, mask, nu = _run(check(x, n, m, kept, weight, stat, eta, var), backend or None, saves, None)
    return (u, mask, nu) if saves else (u, x.new_empty(0, dtype=torch.bool), x.new_empty(0, dtype=compute_dtype(x)))


@_op.register_fake
def _(
    x: Tensor,
    n: int,
    m: int,
    kept: int,
    weight: Tensor | None,
    stat: str,
    eta: Tensor | None,
    var: bool,
    backend: str,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, n, m, kept, weight, stat, eta, var)
    mask_shape, nu_shape = (x.shape, (*x.shape[:-1], 1)) if saves else ((0,), (0,))
    return (
        x.new_empty(x.shape),
        x.new_empty(mask_shape, dtype=torch.bool),
        x.new_empty(nu_shape, dtype=compute_dtype(x)),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    eta, var = inputs[6], inputs[7]
    _, mask, nu = output
    ctx.mark_non_differentiable(mask, nu)
    ctx.save_for_backward(mask, nu if var else None)
    ctx.eta = None if eta is None else (eta.shape, eta.dtype)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: mask and ν are constants."""
    mask, nu = ctx.saved_tensors
    kept_grad = grad if nu is None else grad * nu
    x_grad = torch.where(mask, kept_grad, 0.0).to(grad.dtype) if ctx.needs_input_grad[0] else None
    eta_grad = None
    if ctx.needs_input_grad[6]:
        shape, dtype = ctx.eta
        pulled = torch.where(mask, 0.0 if nu is None else grad - kept_grad, grad).to(
            torch.promote_types(grad.dtype, torch.float32)
        )
        flat = pulled.reshape(-1, pulled.shape[-1])
        eta_grad = (flat.sum(0) if shape.numel() > 1 else flat.sum()).reshape(shape).to(dtype)
    return x_grad, None, None, None, None, None, eta_grad, None, None, None


_op.register_autograd(_backward, setup_context=_save_for_backward)
