"""`random`: the negative control: a fixed choice of channels that looks at nothing."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from nmsweep.methods.base import Criterion, Layer, Slots, State, as_tensor


@dataclass(frozen=True)
class Random(Criterion):
    """The score is a fixed random priority per channel, a permutation of 1…d drawn from (seed, layer name).

    The same for every token, so independent of batching; the global random state is not touched.

    Args:
        seed: of the permutation.

    Source: ours; a negative control.
    """

    seed: int = 0

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        digest = hashlib.sha256(f"{self.seed}/{layer.name}".encode()).digest()
        stream = np.random.RandomState(int.from_bytes(digest[:4], "big"))  # its numbers never change between versions
        order = torch.from_numpy(stream.permutation(layer.weight.shape[1]) + 1)
        return replace(slots, priority=as_tensor(order, layer.weight))
