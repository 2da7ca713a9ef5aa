"""`bias_static`: the mean error of each output channel over a calibration text is given back."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Slot, Slots, State, Tokens, as_tensor
from nmsweep.methods.fitters import rows
from nmsweep.sparsity.linear import centred, pruned, rotated


@dataclass(frozen=True)
class BiasStatic(Mitigation):
    """β = E[y_dense − y_sparse] over the calibration tokens, every other stage in place; fitted last. Calibrated.

    In closed form W·E[x] − (1+γ) ⊙ (W·E[u] + U V·E[(1−k)z]): two means a layer, float64, and one product.

    Source: ours.
    """

    slot: ClassVar[Slot] = "beta"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"
    per_input: ClassVar[bool] = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, beta=self.found(layer, state, "beta"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _MeanError(layer, slots)


class _MeanError(Fitter):
    def __init__(self, layer: Layer, slots: Slots) -> None:
        self.layer, self.slots = layer, slots
        self.n_tokens = 0
        self.x_total, self.u_total, self.removed_total = (
            torch.zeros(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device) for _ in range(3)
        )

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        x = rotated(x, self.slots)
        u, mask = pruned(x, self.slots, self.slots.pattern, Tokens(), {})
        self.x_total += rows(x, scope).double().sum(dim=0)
        self.u_total += rows(u, scope).double().sum(dim=0)
        if self.slots.residual is not None:
            removed = torch.where(mask, 0.0, centred(x, self.slots))
            self.removed_total += rows(removed, scope).double().sum(dim=0)
        self.n_tokens += x.shape[:-1].numel() if scope is None else int(scope.sum())

    def result(self) -> dict[str, Tensor]:
        weight, slots = self.layer.weight.double(), self.slots
        sparse = weight @ self.u_total
        if slots.residual is not None:
            U, V = slots.residual
            sparse = sparse + U.double() @ (V.double() @ self.removed_total)
        if slots.gamma is not None:
            sparse = sparse + slots.gamma.double() * sparse
        beta = (weight @ self.x_total - sparse) / max(1, self.n_tokens)
        return {"beta": as_tensor(beta, self.layer.weight)}
