"""`sparsegpt`: prune weights column by column; the remaining columns compensate for each error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels.reference import keep
from nmsweep.methods.base import Fitter, Layer, Slots, State, WeightCriterion, as_tensor
from nmsweep.methods.fitters import SecondMoment

BLOCK = 128
"""Columns processed together, from SparseGPT's code; rounded up to a multiple of M."""

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean; from SparseGPT's code."""


@dataclass(frozen=True)
class SparseGPT(WeightCriterion):
    """Optimal brain surgeon on each output row with the Hessian E[xxᵀ], fp32. Calibrated.

    Columns are processed in order. The score of a weight is ``W_ij² / [H⁻¹]_jj²`` of the Cholesky factor of H⁻¹, computed when
    its group (N:M) or its block of 128 columns (p%) is reached. The error of a pruned weight is spread over the columns after
    it. A channel that is always 0 gets the weight 0. With p% each block gets its share of the row's budget.

    Source: arXiv:2301.00774 (SparseGPT), Algorithm 1, and its public code.
    Differs: its code applies p% to all rows of a block together; here each output row has its own budget.
    """

    calibration = "text"
    per_input = False

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Surgeon(layer, slots.pattern)

    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        return self.state_entry(layer, state, "weight").to(layer.weight.dtype), int(state["kept"])


class _Surgeon(SecondMoment):
    def __init__(self, layer: Layer, pattern: Pattern) -> None:
        super().__init__("H")
        self.layer, self.pattern = layer, pattern

    def result(self) -> dict[str, Tensor]:
        weight = as_tensor(self.layer.weight, self.layer.weight)
        pruned, mask = prune_columns(weight, super().result()["H"], self.pattern)
        return {"weight": pruned.to(self.layer.weight.dtype), "kept": mask.sum()}


def prune_columns(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the pruned weight and its mask, both [out, in].

    Args:
        weight: [out, in] fp32 (float64).
        hessian: E[xxᵀ], [in, in], in the dtype of the weight.
        pattern: applied along in to each row.
    """
    weight = weight.clone()
    width = weight.shape[1]
    inverse = _inverse_factor(weight, hessian)
    mask = torch.ones_like(weight, dtype=torch.bool)
    step = pattern.m if pattern.kind == "n:m" else BLOCK
    block = -(-BLOCK // step) * step
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros_like(weight[:, start:stop])
        for column in range(start, stop):
            if (column - start) % step == 0:
                chosen = slice(column, min(column + step, stop))
                score = weight[:, chosen].square() / inverse.diagonal()[chosen].square()
                mask[:, chosen] = keep(score, _budget(pattern, chosen, width), score.shape[1])
            old = weight[:, column].clone()
            weight[:, column] = torch.where(mask[:, column], old, 0.0)
            error = (old - weight[:, column]) / inverse[column, column]
            weight[:, column + 1 : stop] -= error[:, None] * inverse[column, column + 1 : stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight, mask


def _inverse_factor(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse Hessian; set the weights of dead channels to 0."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    weight[:, dead] = 0.0
    diagonal += DAMPING * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    return factor


def _budget(pattern: Pattern, columns: slice, width: int) -> int:
    """Return the weights kept of each row in these columns; they add up to the row's budget."""
    if pattern.kind == "n:m":
        return pattern.n
    share = pattern.kept(width) / width
    return int(round(columns.stop * share) - round(columns.start * share))
