"""`wina`: weight channels by the norm of their column of W."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmsweep.methods.base import Criterion, Layer, State, as_tensor


@dataclass(frozen=True)
class Wina(Criterion):
    """w_j = ‖W_:,j‖₂, fp32. From the weights alone, no calibration.

    Source: arXiv:2505.19427 (WINA), eq. 4; the same score in R-Sparse, arXiv:2504.19449.
    """

    def weight(self, layer: Layer, state: State) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(as_tensor(layer.weight, layer.weight), dim=0)
        return norm
