"""`larosa`: inputs are rotated to their principal axes before they are pruned."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.sparsity.fitters import SecondMoment
from nmsweep.sparsity.method import Fitter, Layer, Mitigation, Slot, Slots, State, as_tensor


@dataclass(frozen=True)
class Larosa(Mitigation):
    """(x, W) → (Qᵀx, WQ), Q = the eigenvectors of E[xxᵀ] (uncentred), largest eigenvalue first. Calibrated.

    Each column's entry of largest size is positive. q/k/v and gate/up share one Q. W Q is folded once, beside the model's
    own weight; Qᵀx is computed for every token, which costs in² operations, and Q takes in² numbers of memory a distinct
    input. M:M does not equal the dense layer bit for bit.

    Source: LaRoSA, arXiv:2507.01299.
    Differs: LaRoSA keeps the top k of the whole rotated token and folds Qᵀ into the layers before where it can; here the
    pattern chooses, and with N:M the strongest axes share groups.
    """

    slot: ClassVar[Slot] = "rotation"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        Q = self.found(layer, state, "Q")
        return replace(slots, rotation=Q, folded=(as_tensor(layer.weight, Q) @ Q).to(layer.weight.dtype))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _PrincipalAxes()


class _PrincipalAxes(SecondMoment):
    def __init__(self) -> None:
        super().__init__("Q")

    def result(self) -> dict[str, Tensor]:
        moment = super().result()["Q"]
        axes = torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        return {"Q": as_tensor(axes * largest.sign(), moment)}
