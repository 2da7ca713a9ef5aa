"""The pruned input `u`, computed once for all layers that read one tensor.

Whatever makes that tensor, a norm or a product, can be part of the same kernel call (`fusion`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import add_counts, prune
from nmsweep.methods.base import Slots, Tokens
from nmsweep.sparsity.formula import centred, pruned, rotated
from nmsweep.sparsity.scope import Scope


class TokenView:
    """The state that all layers of a sparse model share.

    Attributes:
        tokens: of the current forward pass.
        scope: which tokens are pruned.
        dense: whether the layers compute as the dense ones do.
        fade: share of the pruned part that is added back; falls from 1 to 0 during a `decay` schedule.
        pattern: replaces the layers' own pattern during a `step` schedule.
        joins: whether norms and products may be fused with the prune.
        needs_past: whether anything depends on the length of the key-value cache; reading it waits for the GPU.
    """

    def __init__(self, scope: Scope | None = None) -> None:
        self.tokens = Tokens()
        self.scope = scope or Scope()
        self.dense = False
        self.fade = 0.0
        self.pattern: Pattern | None = None
        self.joins = True
        self.needs_past = self.scope.kind != "all"

    @contextmanager
    def as_dense(self, dense: bool = True) -> Iterator[None]:
        """Make the layers compute as the dense ones inside the block."""
        before, self.dense = self.dense, dense
        try:
            yield
        finally:
            self.dense = before


class Pruned(NamedTuple):
    """The input of the layers that read one tensor.

    Attributes:
        u: [batch, seq, in] in the dtype of x.
        removed: (1−k)⊙z [batch, seq, in] fp32; None without a residual.
        in_scope: [batch, seq] bool; None where every token is in scope.
    """

    u: Tensor
    removed: Tensor | None
    in_scope: Tensor | None


class SharedInput:
    """The pruned input `u` of the layers that read one tensor (q/k/v; gate/up), computed once.

    Args:
        slots: of the layers; everything that decides `u` is equal for all of them.
        n_readers: how many layers read it; the tensor is released after the last.
        view: state shared by all layers of the model.
        device: where the channel counts live.
    """

    def __init__(self, slots: Slots, n_readers: int, view: TokenView, device: torch.device) -> None:
        self.slots = slots
        self.n_readers = n_readers
        self.view = view
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # kept, total: never read during a forward pass
        self.extra = [0, 0]  # kept, total: further counts of tokens that count more than once, known without the mask
        self.memory: dict[str, Tensor] = {}
        self._x: Tensor | None = None
        self._version = 0
        self._pruned: Pruned | None = None
        self._reads = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile breaks its graph here
    def __call__(self, x: Tensor) -> Pruned:
        """Prune x [batch, seq, in], or return the result of the layer that read it first."""
        if self._x is not x or self._version != _version(x) or self._pruned is None:
            self._remember(x, self._prune(x))
        assert self._pruned is not None
        pruned = self._pruned
        self._reads += 1
        if self._reads == self.n_readers:
            self.forget()
        return pruned

    @property
    def can_fuse(self) -> bool:
        """Whether `u` is one call of the fused primitive that reads x and nothing else."""
        slots = self.slots
        others = (slots.rotation, slots.residual, slots.dynamic, slots.priority, slots.threshold)
        return all(slot is None for slot in others)

    def fuses(self, x: Tensor) -> bool:
        """Whether `prune_parts` may be called in this pass; autograd and compiled graphs need the tensor itself."""
        view = self.view
        if not view.joins or view.dense or view.fade or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return view.scope.tokens(x, view.tokens) is True

    def prune_parts(self, x: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        """Return u of ``x · scale · gain`` (see `kernels.prune`), to be passed to the readers in place of that product."""
        slots, pattern = self.slots, self.view.pattern or self.slots.pattern
        budget = pattern.budget(x.shape[-1])
        u = prune(
            x, **budget, weight=slots.weight, eta=slots.eta, var=slots.nu, scale=scale, gain=gain, counts=self.counts
        )
        self._count_repeats(x, pattern)
        self._remember(u, Pruned(u, None, None))
        return u

    def compile(self, width: int, dtype: torch.dtype) -> None:
        """Compile the kernel for inputs [batch, seq, width], so that no timed pass waits for a compiler."""
        token = torch.zeros(1, 1, width, dtype=dtype, device=self.counts.device)
        counts = torch.zeros_like(self.counts)
        counted = self.view.scope.kind == "all" and self.slots.residual is None
        pattern = self.view.pattern or self.slots.pattern
        pruned(token, self.slots, pattern, Tokens(), {}, counts if counted else None)

    def compile_parts(self, x: Tensor, scale: Tensor | None, gain: Tensor | None) -> None:
        """Compile the kernel for such parts."""
        before = self.counts.clone()
        with torch.no_grad():
            self.prune_parts(x, scale, gain)
        self.counts.copy_(before)
        self.forget()

    def counted(self) -> tuple[int, int]:
        """Return the channels kept and seen since `reset_counts`, weighted as `counting` says. Waits for the device."""
        kept, total = self.counts.tolist()
        return kept + self.extra[0], total + self.extra[1]

    def reset_counts(self) -> None:
        self.counts.zero_()
        self.extra = [0, 0]

    def forget(self) -> None:
        """Release the tensors of the pass."""
        self._x = self._pruned = None

    def _remember(self, x: Tensor, pruned: Pruned) -> None:
        self._x, self._version, self._pruned, self._reads = x, _version(x), pruned, 0

    def _weight(self, x: Tensor) -> Tensor | None:
        """Return how often each token of x [batch, seq, in] counts; None for once."""
        weight = self.view.tokens.weight
        return weight if weight is not None and weight.shape == x.shape[:-1] else None

    def _count_repeats(self, x: Tensor, pattern: Pattern) -> None:
        """Add the further counts of tokens that were counted once; every token keeps the same number of channels."""
        if (weight := self._weight(x)) is not None:
            width, times = x.shape[-1], self.view.tokens.n_counted - weight.numel()
            self.extra[0] += times * pattern.kept(width)
            self.extra[1] += times * width

    def _count(self, mask: Tensor) -> None:
        """Count the channels of a mask [batch, seq, in]."""
        weight = self._weight(mask)
        if weight is None:
            add_counts(mask, self.counts)
            return
        self.counts[0] += (mask.sum(-1) * weight.to(mask.device)).sum()
        self.counts[1] += self.view.tokens.n_counted * mask.shape[-1]

    def _prune(self, x: Tensor) -> Pruned:
        slots, view = self.slots, self.view
        if view.tokens.past == 0:
            self.memory.clear()
        x = rotated(x, slots)
        scope = view.scope.tokens(x, view.tokens)
        if scope is False and view.tokens.past:  # no token to prune, and no criterion needs to remember these
            self.counts += x.numel() if self._weight(x) is None else view.tokens.n_counted * x.shape[-1]
            outside = torch.zeros((), dtype=torch.bool, device=x.device).expand(x.shape[:-1])
            return Pruned(x, None if slots.residual is None else torch.zeros_like(centred(x, slots)), outside)
        pattern = view.pattern or slots.pattern
        exact = slots.threshold is None or self._weight(x) is None
        if scope is True and slots.residual is None and not view.fade and exact:
            u, _ = pruned(x, slots, pattern, view.tokens, self.memory, self.counts)
            self._count_repeats(x, pattern)
            return Pruned(u, None, None)
        u, mask = pruned(x, slots, pattern, view.tokens, self.memory)
        if scope is not True:
            inside = scope if isinstance(scope, Tensor) else x.new_full((), scope, dtype=torch.bool)
            inside = inside.expand(x.shape[:-1])
            u, mask = torch.where(inside[..., None], u, x), mask | ~inside[..., None]
        self._count(mask)
        removed = torch.where(mask, 0.0, centred(x, slots)) if slots.residual is not None or view.fade else None
        if view.fade:
            assert removed is not None
            u = u + (view.fade * removed).to(u.dtype)
        return Pruned(u, None if slots.residual is None else removed, None if scope is True else inside)


def _version(x: Tensor) -> int:
    """Return a number that changes when x is written to; tensors of inference mode do not have one."""
    return 0 if x.is_inference() else x._version
