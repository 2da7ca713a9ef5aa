"""Check the arguments of `prune` and bring them into the form that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATS = ("none", "median", "mean")


@dataclass(slots=True)
class Arguments:
    """One checked call. `m == hidden` is the unstructured pattern."""

    x: Tensor  # [*, hidden], floating; with `scale` or `gain`, x · scale · gain is pruned
    n: int  # kept of each m
    m: int  # divides hidden
    weight: Tensor | None  # [hidden], or [k, hidden]; row r of x uses row r // rows_per_weight
    rows_per_weight: int
    stat: str  # one of STATS
    eta: Tensor | None  # scalar or [hidden]; None for a statistic or 0
    var: bool  # False if all channels are kept, where ν is 1
    scale: Tensor | None = None  # [*, 1] fp32, with a gain [hidden]
    gain: Tensor | None = None  # [hidden] fp32 or in the dtype of x with a scale; in the shape and dtype of x without

    @property
    def has_parts(self) -> bool:
        """Return whether the tensor to prune is a product that is computed in the same pass."""
        return self.gain is not None

    def expanded_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in a shape that broadcasts against x."""
        assert self.weight is not None
        weight = self.weight.to(device=self.x.device, dtype=dtype)
        if weight.ndim == 1:
            return weight
        return weight.repeat_interleave(self.rows_per_weight, dim=0).view(self.x.shape)


def check(
    x: Tensor, n: int, m: int, kept: int, weight: Tensor | None, stat: str, eta: Tensor | None, var: bool,
    scale: Tensor | None = None, gain: Tensor | None = None,
) -> Arguments:  # fmt: skip
    """Check shapes, dtypes and budget of one call.

    Raises:
        ValueError: one of them is invalid; the message names both sides.
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"prune: x is {x.dtype} {list(x.shape)}; it needs a floating dtype and at least one dimension")
    hidden = x.shape[-1]
    if kept:
        n, m = kept, hidden
    if not 0 < n <= m:
        raise ValueError(f"prune: {n} kept of {m}; at least 1 and at most {m} can be kept")
    if hidden % m:
        raise ValueError(f"prune: {hidden} channels are not a multiple of M = {m}")
    if stat not in STATS:
        raise ValueError(f"prune: eta={stat!r}; allowed are None, 'median', 'mean' or a tensor")
    if eta is not None and eta.numel() != 1 and tuple(eta.shape) != (hidden,):
        raise ValueError(f"prune: eta has shape {list(eta.shape)}; allowed are a scalar or [{hidden}]")
    rows_per_weight = x.shape[:-1].numel()
    if weight is not None:
        weight, rows_per_weight = _fold_weight(x, weight)
    _check_parts(x, scale, gain)
    return Arguments(x, n, m, weight, rows_per_weight, stat, eta, var and n < m, scale, gain)


def _check_parts(x: Tensor, scale: Tensor | None, gain: Tensor | None) -> None:
    if scale is None:
        fits = gain is None or (gain.shape == x.shape and gain.dtype == x.dtype)
    else:
        fits = scale.shape == (*x.shape[:-1], 1) and scale.dtype == compute_dtype(x)
        fits &= gain is not None and gain.shape == x.shape[-1:] and gain.dtype in (x.dtype, compute_dtype(x))
    if not fits:
        parts = [part if part is None else f"{part.dtype} {list(part.shape)}" for part in (scale, gain)]
        raise ValueError(f"prune: scale {parts[0]} and gain {parts[1]} for x {x.dtype} {list(x.shape)}; see `prune`")


def _fold_weight(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """Return the weight as [hidden] or [k, hidden], and how many rows of x share one of its rows."""
    shape, hidden = tuple(weight.shape), x.shape[-1]
    if shape == (hidden,):
        return weight, x.shape[:-1].numel()
    if x.ndim == 3 and shape in ((x.shape[0], hidden), (x.shape[0], 1, hidden)):
        return weight.reshape(-1, hidden), x.shape[1]
    if shape == tuple(x.shape):
        return weight.reshape(-1, hidden), 1
    raise ValueError(
        f"prune: weight has shape {list(shape)} for x {list(x.shape)}; allowed are [hidden], [batch, hidden] for "
        "x [batch, tokens, hidden], or the shape of x"
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which x is centred, scored and rescaled."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
