"""The fused primitive as a torch operator, for autograd and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmsweep.kernels.arguments import check, compute_dtype
from nmsweep.kernels.dispatch import run


@torch.library.custom_op("nmsweep::prune", mutates_args=())
def prune_op(
    x: Tensor,
    n: int,
    m: int,
    kept: int,
    weight: Tensor | None,
    stat: str,
    eta: Tensor | None,
    var: bool,
    backend: str,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, the mask and ν of one call; mask and ν are empty without `with_mask`."""
    u, mask, nu = run(check(x, n, m, kept, weight, stat, eta, var), backend, with_mask)
    if mask is None or nu is None:
        return u, x.new_empty(0, dtype=torch.bool), x.new_empty(0, dtype=compute_dtype(x))
    return u, mask, nu


@prune_op.register_fake
def _fake(x: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    *checked, _, with_mask = call  # the arguments of prune_op
    check(x, *checked)
    mask_shape, nu_shape = (x.shape, (*x.shape[:-1], 1)) if with_mask else ((0,), (0,))
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
    """Differentiate straight-through: mask and ν are constants."""
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


prune_op.register_autograd(_backward, setup_context=_save_for_backward)
