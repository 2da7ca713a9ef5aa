"""The fused primitive for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmsweep.kernels.arguments import Arguments, compute_dtype
from nmsweep.kernels.dispatch import run


class Prune(torch.autograd.Function):
    """Return u of a checked call; in the gradient, mask and ν are constants (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eta: Tensor | None, args: Arguments, backend: str | None, mask: Tensor) -> Tensor:
        """Run the call and fill `mask`; `x` and `eta` are those of `args`, passed again so that autograd sees them."""
        nu = x.new_ones((*x.shape[:-1], 1), dtype=compute_dtype(x)) if args.var else None
        u = run(args, backend, mask=mask, nu=nu)
        ctx.save_for_backward(mask, nu)
        ctx.eta = None if eta is None else (eta.shape, eta.dtype)
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x and η."""
        mask, nu = ctx.saved_tensors
        kept_grad = grad if nu is None else grad * nu
        x_grad = torch.where(mask, kept_grad, 0.0).to(grad.dtype) if ctx.needs_input_grad[0] else None
        eta_grad = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.eta
            pulled = torch.where(mask, 0.0 if nu is None else grad - kept_grad, grad).to(
                torch.promote_types(grad.dtype, torch.float32)
            )
            flat = pulled.reshape(-1, pulled.shape[-1])
            eta_grad = (flat.sum(0) if shape.numel() > 1 else flat.sum()).reshape(shape).to(dtype)
        return x_grad, eta_grad, None, None, None
