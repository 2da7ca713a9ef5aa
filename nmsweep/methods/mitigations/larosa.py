"""`larosa`: inputs are rotated to their principal axes before they are pruned."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.methods.base import Fitter, Layer, Mitigation, Slot, Slots, State, as_tensor
from nmsweep.methods.fitters import SecondMoment


@dataclass(frozen=True)
class Larosa(Mitigation):
    """(x, W) → (Qᵀx, WQ), Q = the eigenvectors of E[xxᵀ] (uncentred). Calibrated.

    Axes go from the largest eigenvalue to the smallest; under N:M they are dealt out to the groups in turn, so that each
    group of M has an equal share of strong and weak ones. Each column's entry of largest size is positive. q/k/v and gate/up share one Q. W Q is folded once, beside the model's
    own weight; Qᵀx is computed for every token, which costs in² operations, and Q takes in² numbers of memory a distinct
    input. M:M does not equal the dense layer bit for bit.

    Source: LaRoSA, arXiv:2507.01299.
    Differs: LaRoSA keeps the top k of the whole rotated token and folds Qᵀ into the layers before where it can; here the
    pattern chooses, and under N:M the axes are dealt out: side by side the strongest would push each other out.
    """

    version: ClassVar[int] = 2
    slot: ClassVar[Slot] = "rotation"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        Q = self.found(layer, state, "Q")
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
    """The columns of [in, in] dealt out to the groups of an N:M pattern in turn; as they are under other patterns."""
    if pattern.kind != "n:m":
        return axes
    columns: Tensor = axes.unflatten(1, (pattern.m, -1)).transpose(1, 2).flatten(1)
    return columns
