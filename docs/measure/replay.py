"""Give the masks of one scoring path to another: what is left of their difference is not a flipped near-tie.

The causal mask of a token depends only on the tokens up to it, so it is kept under a hash of these.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmsweep.evaluate.logits import decoder
from nmsweep.kernels import reference
from nmsweep.sparsity import formula
from nmsweep.sparsity.install import SparseModel
from nmsweep.sparsity.shared_input import Pruned, SharedInput

Key = int


class Masks:
    """The masks of an installed model's layers, by the tokens that lead to them.

    Args:
        layers: the model while it is sparse; scope ``all``, a criterion that does not look across tokens.
    """

    def __init__(self, layers: SparseModel) -> None:
        self.model = layers.model
        self.shared = list({id(layer.shared): layer.shared for layer in layers.layers.values()}.values())
        self._masks: list[dict[Key, np.ndarray[Any, Any]]] = [{} for _ in self.shared]
        self._keys: list[list[Key]] = []
        self._prefix: Key = 0

    def recording(self) -> AbstractContextManager[None]:
        """Keep the masks of each token inside the block, the first time it is seen."""
        return self._pruning_by(self._record)

    def replaying(self) -> AbstractContextManager[None]:
        """Prune by the kept masks inside the block; a token without one (padding) keeps every channel."""
        return self._pruning_by(self._replay)

    @contextmanager
    def _pruning_by(self, prune: Callable[[int, Tensor], Pruned]) -> Iterator[None]:
        hook = decoder(self.model).register_forward_pre_hook(self._set_keys, with_kwargs=True)
        view = self.shared[0].view
        before, view.joins = view.joins, False  # the layers must be given the tensor itself
        try:
            for at, shared in enumerate(self.shared):
                shared._prune = partial(prune, at)  # type: ignore[method-assign]
            yield
        finally:
            hook.remove()
            view.joins = before
            for shared in self.shared:
                del shared._prune

    def _set_keys(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute each token's key. A row is in depth-first order: a token's parent is the last one a level above."""
        ids = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).tolist()
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        depths = positions.tolist() if positions is not None else [range(len(row)) for row in ids]
        self._keys = [self._row_keys(row, depth) for row, depth in zip(ids, depths, strict=True)]
        if cache is not None and positions is None:
            self._prefix = self._keys[0][-1]

    def _row_keys(self, ids: list[int], depths: Any) -> list[Key]:
        path: dict[int, Key] = {}
        keys = []
        for token, depth in zip(ids, depths, strict=True):
            parent = path.get(depth - 1, self._prefix) if depth else 0
            path[depth] = hash((parent, token, depth))
            keys.append(path[depth])
        return keys

    def _record(self, at: int, x: Tensor) -> Pruned:
        shared: SharedInput = self.shared[at]
        u, mask = formula.pruned(x, shared.slots, shared.slots.pattern, shared.view.tokens, shared.memory)
        packed = np.packbits(mask.cpu().numpy(), axis=-1)
        for row, keys in zip(packed, self._keys, strict=True):
            for bits, key in zip(row, keys, strict=True):
                self._masks[at].setdefault(key, bits)
        return Pruned(u, None, None)

    def _replay(self, at: int, x: Tensor) -> Pruned:
        width = x.shape[-1]
        everything = np.full(-(-width // 8), 255, dtype=np.uint8)
        bits = [[self._masks[at].get(key, everything) for key in keys] for keys in self._keys]
        mask = torch.from_numpy(np.unpackbits(np.array(bits), axis=-1, count=width).astype(bool)).to(x.device)
        slots = self.shared[at].slots
        u, _ = reference.filled(x, mask, formula.shift(x, slots), slots.nu)
        return Pruned(u, None, None)
