"""The fused primitive in plain torch, on any device: the formula line by line, and the oracle of the other backends.

For one token `x` [hidden], computed in fp32 (float64 for float64 `x`); `fl` is one rounding to that type::

    η  = rounded to the dtype of x, so that fill and centre are the same number; a zero η is +0
    z  = fl(x − η)
    s  = |fl(z · w)|
    k  = the n highest of each m consecutive channels (or the `kept` highest of the token), by (s, then lower channel)
    ν  = √(Var z / Var k⊙z) over channels, 1 if either is 0
    u  = k ? x : η                                      without var: kept channels pass bit for bit
    u  = k ? fl(x + fl(fl(ν−1)·z)) : η                  with var, rounded to the dtype of x; x itself where ν = 1 or z = 0

With `scale` and `gain`, x is first multiplied by them, with the roundings of the operations that this replaces::

    x ← round(fl(x·gain))                               without scale; round: to the dtype of x
    x ← round(fl(round(fl(x·scale))·gain))              a gain in the dtype of x
    x ← round(fl(fl(x·scale)·gain))                     a gain in fp32: nothing is rounded in between

Every backend must reproduce the following to the bit, because the mask depends on it:

* median: the lower of the two middle values, an element of x;
* mean: each x is rounded to the grid 2⁻³⁶·P, P the power of two above the largest |x| of the token; float64 sums of such numbers
  are exact in any order up to 2¹⁷ channels; then divided by hidden in float64 and rounded to fp32, then to the dtype of x.
  (float64 x: a sum in a fixed tree order.)
* NaN: a NaN score outranks +inf and ties with other NaNs, so a NaN of x survives unless n other NaNs of its group precede it.
  A NaN in x makes the median and the mean NaN: every pruned channel of the token becomes NaN.
* The variances are float64 sums and only ν is rounded, so backends may differ in its last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmsweep.kernels.arguments import Arguments, compute_dtype

_EXPONENT_BITS = 0x7FF << 52


def prune(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, score, keep and rescale.

    Returns:
        u [*, hidden] in the dtype of x; the mask k, bool [*, hidden]; ν [*, 1] in the compute dtype (ones without `var`).
    """
    x = make(args.x, args.scale, args.gain)
    eta = centre(x, args.stat, args.eta)
    z = centred(x, eta)
    score = (z if args.weight is None else z * args.expanded_weight(z.dtype)).abs()
    mask = keep(score, args.n, args.m)
    u, nu = filled(x, mask, eta, args.var)
    return u, mask, nu


def make(x: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return x · scale · gain in the shape and dtype of x; x itself if both are None."""
    dtype = x.dtype
    if scale is not None:
        x = x.to(scale.dtype) * scale
    if gain is None or gain.dtype == dtype:
        x = x.to(dtype)
    return x if gain is None else (x * gain).to(dtype)


def centre(x: Tensor, stat: str, eta: Tensor | None) -> Tensor | None:
    """Return η in the dtype of x: [*, 1] for a statistic, else the given scalar or [hidden] tensor; None for no centre."""
    if eta is not None:
        return eta.to(device=x.device, dtype=x.dtype) + 0.0
    if stat == "median":
        return x.median(dim=-1, keepdim=True).values + 0.0
    if stat == "mean":
        return token_mean(x)
    return None


def centred(x: Tensor, eta: Tensor | None) -> Tensor:
    """Return z in the compute dtype."""
    compute = compute_dtype(x)
    return x.to(compute) if eta is None else x.to(compute) - eta.to(compute)


def filled(x: Tensor, mask: Tensor, eta: Tensor | None, var: bool) -> tuple[Tensor, Tensor]:
    """Return u and ν for a given mask; ν takes no gradient."""
    fill = x.new_zeros(()) if eta is None else eta
    if not var:
        return torch.where(mask, x, fill), x.new_ones(*x.shape[:-1], 1, dtype=compute_dtype(x))
    z = centred(x, eta)
    nu = variance_ratio(z.detach(), mask)
    rescaled = (x.to(z.dtype) + (nu - 1) * z).to(x.dtype)
    return torch.where(mask, torch.where((nu == 1) | (z == 0), x, rescaled), fill), nu


def token_mean(x: Tensor) -> Tensor:
    """Return the mean over channels in the order-free arithmetic of the module docstring: [*, 1], dtype of x."""
    hidden = x.shape[-1]
    if x.dtype == torch.float64:
        return tree_sum(x) / hidden + 0.0
    wide = in_float64(x)
    peak = wide.abs().amax(dim=-1, keepdim=True)
    power = (peak.view(torch.int64) & _EXPONENT_BITS).view(torch.float64)  # the power of two at or below the peak
    magic = power * (3 * 2**16)  # adding it leaves multiples of 2⁻³⁵·power
    on_grid = torch.where(peak.isfinite(), (wide + magic) - magic, wide)
    return (on_grid.sum(dim=-1, keepdim=True) / hidden).float().to(x) + 0.0


def keep(score: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the n highest scores of each m consecutive channels; NaN is highest, ties go to the lower channel."""
    grouped = score.unflatten(-1, (-1, m))
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)


def variance_ratio(z: Tensor, mask: Tensor) -> Tensor:
    """Return ν = √(Var z / Var k⊙z) over channels, or 1 if either variance is 0: [*, 1], dtype of z."""
    dense, sparse = _variance(z), _variance(torch.where(mask, z, 0.0))
    nu = (dense / sparse).sqrt()
    return torch.where((dense == 0) | (sparse == 0), 1.0, nu).to(z)


def _variance(z: Tensor) -> Tensor:
    """Return the variance over channels times hidden, float64 [*, 1]; exactly 0 for a constant row."""
    z = in_float64(z)
    z = z - z[..., :1]
    return tree_sum((z - tree_sum(z) / z.shape[-1]).square())


def in_float64(x: Tensor) -> Tensor:
    """Return x in float64, on the CPU if its device has no float64."""
    lacks_float64 = x.device.type == "mps" or (
        x.device.type == "xpu" and not torch.xpu.get_device_properties(x.device).has_fp64
    )
    return (x.cpu() if lacks_float64 else x).double()


def tree_sum(x: Tensor) -> Tensor:
    """Return the sum over channels, in an order that depends only on their number: [*, 1]."""
    while (width := x.shape[-1]) > 1:
        half = (width + 1) // 2
        low, high = x[..., :half], x[..., half:]
        x = low + high if width % 2 == 0 else torch.cat([low[..., :-1] + high, low[..., -1:]], dim=-1)
    return x
