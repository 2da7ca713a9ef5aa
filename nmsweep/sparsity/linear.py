"""The sparse layer that takes the place of a dense one."""

import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.methods.base import Slots
from nmsweep.sparsity.formula import output
from nmsweep.sparsity.shared_input import SharedInput

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


class SparseLinear(nn.Module):
    """A linear layer that computes with its pruned input. It shares the hooks of the dense layer.

    Args:
        dense: the layer it replaces; its weight and bias are used in place, never copied.
        shared: the pruned input that it reads.
        slots: this layer's slots.
        drops_bias: leave b out, as the paper's code does.
    """

    def __init__(self, dense: nn.Linear, shared: SharedInput, slots: Slots, drops_bias: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.shared = shared
        self.slots = slots
        self.drops_bias = drops_bias
        for name in _HOOKS:
            setattr(self, name, getattr(dense, name))

    @property
    def weight(self) -> Tensor:
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.drops_bias else self.dense.bias

    @property
    def in_features(self) -> int:
        return self.dense.in_features

    @property
    def out_features(self) -> int:
        return self.dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map x [*, in] to y [*, out]."""
        if self.shared.view.dense:
            return F.linear(x, self.weight, self.dense.bias)
        u, removed, in_scope = self.shared(x)
        weight = self.weight if self.slots.folded is None else self.slots.folded
        return output(u, removed, in_scope, weight, self.bias, self.slots)
