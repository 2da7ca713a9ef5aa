"""`random`: rank channels by a fixed random order, as a negative control."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from nmsweep.methods.base import Criterion, Layer, Slots, State, as_tensor


@dataclass(frozen=True)
class Random(Criterion):
    """The score is a fixed random priority for each channel: a permutation of 1…d drawn from (seed, layer name).

    It is the same for every token, so the result does not depend on batching. The global random state is not used.

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
