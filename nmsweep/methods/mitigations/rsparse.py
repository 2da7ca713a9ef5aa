"""`rsparse`: what is pruned away still passes, through a low-rank copy of the weight."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Slot, Slots, State, as_tensor


@dataclass(frozen=True)
class RSparse(Mitigation):
    """U V = the truncated SVD of W of the given rank, fp32, applied to the pruned-away part: y += U V (1−k)⊙z.

    From the weights alone: decomposed once in float64 and kept with the calibrated state. Costs 2·rank·(in + out)
    operations a token and layer.

    Args:
        rank: of U V; a weight with a smaller side than this keeps its full rank, so nothing of its layer is lost.

    Source: arXiv:2504.19449 (R-Sparse).
    Differs: R-Sparse thresholds its input and searches a rank for each layer; here pattern and criterion choose, and the
    rank is one number.
    """

    rank: int = 64
    slot: ClassVar[Slot] = "residual"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "weights"
    per_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}; at least 1: rank 0 would have no effect")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, residual=(self.found(layer, state, "U"), self.found(layer, state, "V")))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _TruncatedSvd(layer, self.rank)


class _TruncatedSvd(Fitter):
    sees: ClassVar[Literal["input", "gradient", "nothing"]] = "nothing"

    def __init__(self, layer: Layer, rank: int) -> None:
        self.layer, self.rank = layer, min(rank, *layer.weight.shape)

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        """Nothing: the weight is all it takes."""

    def result(self) -> dict[str, Tensor]:
        weight = self.layer.weight
        U, sizes, V = torch.linalg.svd(weight.double(), full_matrices=False)
        root = sizes[: self.rank].sqrt()
        return {
            "U": as_tensor(U[:, : self.rank] * root, weight),
            "V": as_tensor(root[:, None] * V[: self.rank], weight),
        }
