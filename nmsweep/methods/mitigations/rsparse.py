"""`rsparse`: pass what is pruned away through a low-rank copy of the weight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Slots, State, as_tensor


@dataclass(frozen=True)
class RSparse(Mitigation):
    """U V = the truncated SVD of W with the given rank, fp32, applied to the pruned part: y += U V (1−k)⊙z.

    From the weights alone: decomposed once in float64 and stored with the calibrated state. It costs 2·rank·(in + out)
    operations per token and layer.

    Args:
        rank: of U V; a weight whose smaller side is below this keeps its full rank, so its layer loses nothing.

    Source: arXiv:2504.19449 (R-Sparse).
    Differs: R-Sparse thresholds its input and searches a rank for each layer; here pattern and criterion select the
    channels, and one rank holds for all layers.
    """

    rank: int = 64
    slot = "residual"
    calibration = "weights"
    per_input = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}; at least 1: rank 0 would have no effect")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, residual=(self.state_entry(layer, state, "U"), self.state_entry(layer, state, "V")))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _TruncatedSvd(layer, self.rank)


class _TruncatedSvd(Fitter):
    sees = "nothing"

    def __init__(self, layer: Layer, rank: int) -> None:
        self.layer, self.rank = layer, min(rank, *layer.weight.shape)

    def result(self) -> dict[str, Tensor]:
        weight = self.layer.weight
        U, sizes, V = torch.linalg.svd(weight.double(), full_matrices=False)
        root = sizes[: self.rank].sqrt()
        return {
            "U": as_tensor(U[:, : self.rank] * root, weight),
            "V": as_tensor(root[:, None] * V[: self.rank], weight),
        }
