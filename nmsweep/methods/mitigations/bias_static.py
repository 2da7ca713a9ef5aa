"""`bias_static`: add to each output channel its mean error over a calibration text."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Pruning, Slots, State, as_tensor


@dataclass(frozen=True)
class BiasStatic(Mitigation):
    """β = E[y_dense − y_sparse] over the calibration tokens with every other stage in place; fitted last. Calibrated.

    In closed form W·E[x] − (1+γ) ⊙ (W·E[u] + U V·E[(1−k)z]): two float64 means for each layer and one product.

    Source: ours.
    """

    slot = "beta"
    calibration = "text"
    per_input = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, beta=self.state_entry(layer, state, "beta"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _MeanError(layer, slots)


class _MeanError(Fitter):
    """β from the sums of x, u and (1−k)⊙z, each [in] float64.

    Args:
        layer: its weight multiplies x and u.
        slots: the residual and γ.
    """

    def __init__(self, layer: Layer, slots: Slots) -> None:
        self.layer, self.slots = layer, slots
        self.n_tokens = 0
        self.x_total, self.u_total, self.removed_total = (
            torch.zeros(layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device) for _ in range(3)
        )

    def update(self, pruning: Pruning) -> None:
        self.x_total += pruning.x.double().sum(dim=0)
        self.u_total += pruning.u.double().sum(dim=0)
        if pruning.removed is not None:
            self.removed_total += pruning.removed.double().sum(dim=0)
        self.n_tokens += len(pruning.x)

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
