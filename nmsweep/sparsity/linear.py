"""The formula, for one linear layer and one token's input x [in_features]; every other file only fills its slots.

    z  = x − η                              η: Slots.eta
    s  = |z| · w                            w: Slots.weight or Slots.dynamic
    k  = keep(s, pattern)                   exactly N kept of each M consecutive channels
    u  = k ? x + (ν−1)·z : η                ν: Slots.nu; without it u = k ? x : η, kept channels bit for bit
    y  = (1+γ) ⊙ [ W u + U V (1−k)⊙z ] + β + b

Everything down to `u` is one call of the fused primitive in `kernels`; layers that share an input share one `u`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.sparsity.kernels import prune
from nmsweep.sparsity.method import Slots, Tokens, as_tensor


class TokenView:
    """The current forward pass's `Tokens`, shared by all layers of an installed model."""

    tokens: Tokens = Tokens()


class SharedInput:
    """The pruned input `u` of the layers that read one tensor (q/k/v; gate/up), computed once.

    Args:
        slots: the slots of the layers; η, w and ν are equal for all of them.
        n_readers: how many layers read it; the tensor is let go after the last.
        view: what is known about the tokens.
        device: where the channel counts live.
    """

    def __init__(self, slots: Slots, n_readers: int, view: TokenView, device: torch.device) -> None:
        self.slots = slots
        self.n_readers = n_readers
        self.view = view
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # kept, total: never read during a forward pass
        self._x: Tensor | None = None
        self._pruned: tuple[Tensor, Tensor | None] | None = None
        self._reads = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prune x [*, in].

        Returns:
            u [*, in] in the dtype of x, and the mask k (bool) where a residual needs it.
        """
        if self._x is not x or self._pruned is None:
            self._x, self._pruned, self._reads = x, self._prune(x), 0
        pruned = self._pruned
        self._reads += 1
        if self._reads == self.n_readers:
            self.forget()
        return pruned

    def forget(self) -> None:
        """Let go of the tensors of an unfinished pass."""
        self._x = self._pruned = None

    def _prune(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        slots, pattern = self.slots, self.slots.pattern
        hidden = x.shape[-1]
        weight = (
            slots.weight if slots.dynamic is None else slots.dynamic.token_weight(self._centred(x), self.view.tokens)
        )
        budget: dict[str, int] = (
            {"n": pattern.n, "m": pattern.m} if pattern.kind == "n:m" else {"kept": pattern.kept(hidden)}
        )
        if slots.residual is None:
            return prune(x, **budget, weight=weight, eta=slots.eta, var=slots.nu, counts=self.counts), None
        return prune(x, **budget, weight=weight, eta=slots.eta, var=slots.nu, counts=self.counts, return_mask=True)

    def _centred(self, x: Tensor) -> Tensor:
        """z in fp32 (float64 for float64 x)."""
        eta = self.slots.eta
        wide = as_tensor(x, x)
        if eta is None:
            return wide
        if eta == "median":
            return wide - as_tensor(x.median(dim=-1, keepdim=True).values, x)
        if eta == "mean":
            return wide - as_tensor(token_mean(x), x)
        assert isinstance(eta, Tensor)
        return wide - as_tensor(eta.to(x.dtype), x)


class SparseLinear(nn.Module):
    """A dense layer that sees its pruned input.

    Args:
        dense: the layer it stands in for; its weight and bias are used as they are, never copied.
        shared: the input it reads.
        slots: this layer's slots.
    """

    def __init__(self, dense: nn.Linear, shared: SharedInput, slots: Slots) -> None:
        super().__init__()
        self.dense = dense
        self.shared = shared
        self.slots = slots

    @property
    def weight(self) -> Tensor:
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        return self.dense.bias

    @property
    def in_features(self) -> int:
        return self.dense.in_features

    @property
    def out_features(self) -> int:
        return self.dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [*, in] to y [*, out]."""
        u, mask = self.shared(x)
        slots = self.slots
        if slots.residual is None and slots.gamma is None and slots.beta is None:
            return F.linear(u, self.weight, self.bias)
        y = as_tensor(F.linear(u, self.weight), x)
        if slots.residual is not None:
            assert mask is not None
            U, V = slots.residual
            removed = torch.where(mask, 0.0, self.shared._centred(x))
            y = y + F.linear(F.linear(removed, V), U)
        if slots.gamma is not None:
            y = y + slots.gamma * y  # 1+γ is never formed: it would round small γ away
        for addend in (slots.beta, self.bias):
            if addend is not None:
                y = y + addend
        return y.to(x.dtype)


def token_mean(x: Tensor) -> Tensor:
    """The mean over channels as the kernels define it: [*, 1], dtype of x."""
    from nmsweep.sparsity.kernels.reference import token_mean as reference_mean

    return reference_mean(x)
