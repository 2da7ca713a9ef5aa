"""`amber`: weight channels by the norm of their column of W, standardised without its outliers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nmsweep.methods.base import Criterion, Layer, State, as_tensor

TAIL = 0.005
"""Share of the entries on each side that count as outliers: below the 0.5 % and above the 99.5 % quantile."""


@dataclass(frozen=True)
class Amber(Criterion):
    """w_j = ‖Ŵ_:,j‖₂, Ŵ = (W−μ)/σ with μ, σ of the entries inside the 0.5–99.5 % quantiles, fp32. No calibration.

    The quantiles are exact order statistics of all entries; entries equal to a quantile are inside. Where all entries inside
    are equal, σ = 1.

    Args:
        drop_outliers: leave the entries outside the quantiles out of the norm too.

    Source: arXiv:2508.02128 (Amber Pruner).
    Differs: outliers stay in the norm by default, as in the code of arXiv:2509.22166; that code samples the quantiles
    again at every pass. The paper divides by the smallest norm, which changes no mask.
    """

    drop_outliers: bool = False

    def weight(self, layer: Layer, state: State) -> Tensor:
        weight = as_tensor(layer.weight, layer.weight)
        low, high = _quantiles(layer.weight)
        inside = (weight >= low) & (weight <= high)
        count = inside.sum()
        mean = torch.where(inside, weight, 0.0).sum(dtype=torch.float64) / count
        spread = torch.where(inside, weight.double() - mean, 0.0).square().sum()
        sigma = (spread / count).sqrt()
        standard = (weight - mean.to(weight.dtype)) / torch.where(sigma == 0, 1.0, sigma).to(weight.dtype)
        if self.drop_outliers:
            standard = torch.where(inside, standard, 0.0)
        norm: Tensor = torch.linalg.vector_norm(standard, dim=0)
        return norm


def _quantiles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest entry that lie inside the two quantiles."""
    last = weight.numel() - 1
    flat = weight.flatten()
    low = flat.kthvalue(math.ceil(TAIL * last) + 1).values
    return low, flat.kthvalue(math.floor((1 - TAIL) * last) + 1).values
