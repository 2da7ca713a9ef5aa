"""The masks of one scoring path given to another: what is left of their difference is not a flipped near-tie.

A causal mask of a token depends on the tokens before it and on nothing else, so it is kept under a hash of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nmsweep.evaluate.logits import decoder
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
        self._kept: list[dict[Key, np.ndarray[Any, Any]]] = [{} for _ in self.shared]
        self._keys: list[list[Key]] = []
        self._prefix: Key = 0
        self.n_missing = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep each token's masks, the first time it is seen."""
        with self._around("record"):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Prune by the kept masks; a token without one (padding) keeps every channel and is counted in `n_missing`."""
        with self._around("replay"):
            yield

    @contextmanager
    def _around(self, what: Literal["record", "replay"]) -> Iterator[None]:
        hook = decoder(self.model).register_forward_pre_hook(self._watch, with_kwargs=True)
        act = self._record if what == "record" else self._replay
        view = self.shared[0].view
        before, view.joins = view.joins, False  # the layers are to be given the tensor itself
        try:
            for at, shared in enumerate(self.shared):
                shared._prune = lambda x, at=at, shared=shared: act(at, shared, x)  # type: ignore[method-assign,misc]
            yield
        finally:
            hook.remove()
            view.joins = before
            for shared in self.shared:
                del shared._prune

    def _watch(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out each token's key. A row is in depth-first order: a token's parent is the last one a level above."""
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

    def _record(self, at: int, shared: SharedInput, x: Tensor) -> Pruned:
        u, mask = self._free(shared, x)
        packed = np.packbits(mask.cpu().numpy(), axis=-1)
        for row, keys in zip(packed, self._keys, strict=True):
            for bits, key in zip(row, keys, strict=True):
                self._kept[at].setdefault(key, bits)
        return Pruned(u, None, None)

    def _replay(self, at: int, shared: SharedInput, x: Tensor) -> Pruned:
        kept, width = self._kept[at], x.shape[-1]
        everything = np.full(-(-width // 8), 255, dtype=np.uint8)
        found = [[kept.get(key, everything) for key in keys] for keys in self._keys]
        self.n_missing += sum(bits is everything for row in found for bits in row)
        mask = np.unpackbits(np.array(found), axis=-1, count=width).astype(bool)
        return Pruned(formula.filled(x, torch.from_numpy(mask).to(x.device), shared.slots), None, None)

    @staticmethod
    def _free(shared: SharedInput, x: Tensor) -> tuple[Tensor, Tensor]:
        slots = shared.slots
        return formula.pruned(x, slots, slots.pattern, shared.view.tokens, shared.memory)
