"""`larosa`: rotate inputs to their principal axes before they are pruned."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.methods.base import Fitter, Layer, Mitigation, Slots, State, as_tensor
from nmsweep.methods.fitters import SecondMoment


@dataclass(frozen=True)
class Larosa(Mitigation):
    """(x, W) → (Qᵀx, WQ), Q = the eigenvectors of E[xxᵀ] (uncentred). Calibrated.

    Axes are sorted from the largest eigenvalue to the smallest. Under N:M they are dealt out to the groups in turn, so that
    each group of M gets an equal share of strong and weak axes. The entry of largest magnitude in each column is positive.
    q/k/v and gate/up share one Q. W Q is folded once and stored next to the model's own weight. Computing Qᵀx costs in²
    operations per token, and Q takes in² numbers of memory for each distinct input. M:M equals the dense layer only up to
    rounding.

    Source: LaRoSA, arXiv:2507.01299.
    Differs: LaRoSA keeps the top k of the whole rotated token and folds Qᵀ into the preceding layers where it can; here the
    pattern selects, and under N:M the axes are dealt out: adjacent strong axes would compete for the same N places.
    """

    version = 2
    slot = "rotation"
    calibration = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        Q = self.state_entry(layer, state, "Q")
        return replace(slots, rotation=Q, folded=(as_tensor(layer.weight, Q) @ Q).to(layer.weight.dtype))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _PrincipalAxes(slots.pattern)


class _PrincipalAxes(SecondMoment):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__("Q")
        self.pattern = pattern

    def result(self) -> dict[str, Tensor]:
        moment = super().result()["Q"]
        axes = torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        return {"Q": as_tensor(dealt(axes * largest.sign(), self.pattern), moment)}


def dealt(axes: Tensor, pattern: Pattern) -> Tensor:
    """Deal the columns of [in, in] out to the groups of an N:M pattern in turn; leave them as they are for other patterns."""
    if pattern.kind != "n:m":
        return axes
    columns: Tensor = axes.unflatten(1, (pattern.m, -1)).transpose(1, 2).flatten(1)
    return columns
