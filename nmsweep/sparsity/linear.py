"""The formula, for one linear layer and one token's input x [in_features]; every other file only fills its slots.

    (x, W) ← (Qᵀx, WQ)                      Q: Slots.rotation, with WQ in Slots.folded; without it nothing changes
    z  = x − η                              η: Slots.eta
    s  = |z| · w                            w: Slots.weight or Slots.dynamic; Slots.priority replaces s
    k  = keep(s, pattern)                   exactly N kept of each M consecutive channels; or s ≥ Slots.threshold
    u  = k ? x + (ν−1)·z : η                ν: Slots.nu; without it u = k ? x : η, kept channels bit for bit
    y  = (1+γ) ⊙ [ W u + U V (1−k)⊙z ] + β + b

Everything down to `u` is one call of the fused primitive in `kernels`; layers that share an input share one `u`. What makes the
input, a norm or a product, can be part of that call (`fusion`).
A token outside the scope has k = 1 everywhere, ν = 1, γ = 0, β = 0: it sees the dense layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import add_counts, prune
from nmsweep.kernels.reference import centre, keep, variance_ratio
from nmsweep.methods.base import Memory, Slots, Tokens, as_tensor
from nmsweep.sparsity.scope import Scope


class TokenView:
    """What all layers of an installed model share.

    Attributes:
        tokens: of the current forward pass.
        scope: which tokens are pruned.
        dense: whether the layers act as the dense ones, for a teacher's pass.
        fade: the share of the pruned part that is still there, 1 to 0 in the course of a `decay` schedule.
        pattern: takes the place of the layers' own in the course of a `step` schedule.
        joins: whether norms and products may hand the prune their parts (`fusion`) instead of a tensor.
        needs_past: whether anything depends on how many tokens are in the cache; a cache on a GPU has to be waited for.
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
        """The layers are dense inside the block."""
        before, self.dense = self.dense, dense
        try:
            yield
        finally:
            self.dense = before


class Pruned(NamedTuple):
    """What the layers of one input see: u [*, in]; (1−k)⊙z in fp32 where a residual needs it; [*] bool or None for all."""

    u: Tensor
    removed: Tensor | None
    in_scope: Tensor | None


class SharedInput:
    """The pruned input `u` of the layers that read one tensor (q/k/v; gate/up), computed once.

    Args:
        slots: the slots of the layers; what decides `u` is equal for all of them.
        n_readers: how many layers read it; the tensor is let go after the last.
        view: what is known about the tokens.
        device: where the channel counts live.
    """

    def __init__(self, slots: Slots, n_readers: int, view: TokenView, device: torch.device) -> None:
        self.slots = slots
        self.n_readers = n_readers
        self.view = view
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # kept, total: never read during a forward pass
        self.beyond = [0, 0]  # kept, total: how often tokens count beyond once, where every token keeps the same number
        self.memory: dict[str, Tensor] = {}
        self._x: Tensor | None = None
        self._version = 0
        self._pruned: Pruned | None = None
        self._reads = 0

    def __call__(self, x: Tensor) -> Pruned:
        """Prune x [batch, seq, in]."""
        if self._x is not x or self._version != _version(x) or self._pruned is None:
            self._x, self._version, self._pruned, self._reads = x, _version(x), self._prune(x), 0
        pruned = self._pruned
        self._reads += 1
        if self._reads == self.n_readers:
            self.forget()
        return pruned

    @property
    def can_take_parts(self) -> bool:
        """Whether `u` is one call of the fused primitive on x alone: nothing else needs x."""
        slots = self.slots
        others = (slots.rotation, slots.residual, slots.dynamic, slots.priority, slots.threshold)
        return all(slot is None for slot in others)

    def takes_parts(self, x: Tensor) -> bool:
        """Whether the parts of x can be given to `made` in this pass. Gradients and compiled graphs see the tensor itself."""
        view = self.view
        if not view.joins or view.dense or view.fade or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return view.scope.tokens(x, view.tokens) is True

    def made(self, x: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        """u of the tensor that x, scale and gain make, as `kernels.prune` takes them; its readers are given it in place of that tensor."""
        slots = self.slots
        share = budget(self.view.pattern or slots.pattern, x.shape[-1])
        u = prune(
            x, **share, weight=slots.weight, eta=slots.eta, var=slots.nu, scale=scale, gain=gain, counts=self.counts
        )
        self._weigh(x, self.view.pattern or slots.pattern)
        self._x, self._version, self._pruned, self._reads = u, _version(u), Pruned(u, None, None), 0
        return u

    def prepare(self, width: int, dtype: torch.dtype) -> None:
        """Compile what a pass over inputs [batch, seq, width] needs, so that no measured pass waits for a compiler."""
        token = torch.zeros(1, 1, width, dtype=dtype, device=self.counts.device)
        pattern = self.view.pattern or self.slots.pattern
        if self.view.scope.kind == "all" and self.slots.residual is None:
            pruned(token, self.slots, pattern, Tokens(), {}, torch.zeros_like(self.counts))
        else:
            pruned(token, self.slots, pattern, Tokens(), {})

    def prepare_parts(self, x: Tensor, scale: Tensor | None, gain: Tensor | None) -> None:
        """Compile what a pass over such parts needs."""
        before = self.counts.clone()
        with torch.no_grad():
            self.made(x, scale, gain)
        self.counts.copy_(before)
        self.forget()

    def counted(self) -> tuple[int, int]:
        """Kept and all channels since `reset_counts`, each token as often as it counts. Waits for the device."""
        kept, total = self.counts.tolist()
        return kept + self.beyond[0], total + self.beyond[1]

    def reset_counts(self) -> None:
        self.counts.zero_()
        self.beyond = [0, 0]

    def _weight(self, x: Tensor) -> Tensor | None:
        """How often each token of x [batch, seq, in] counts; None for once."""
        weight = self.view.tokens.weight
        return weight if weight is not None and weight.shape == x.shape[:-1] else None

    def _weigh(self, x: Tensor, pattern: Pattern) -> None:
        """Let the tokens of x, which were counted once each, count as often as they should; the pattern is of exact counts."""
        if (weight := self._weight(x)) is not None:
            width, times = x.shape[-1], self.view.tokens.n_counted - weight.numel()
            kept = pattern.n * width // pattern.m if pattern.kind == "n:m" else pattern.kept(width)
            self.beyond[0] += times * kept
            self.beyond[1] += times * width

    def _count(self, mask: Tensor) -> None:
        """Count the channels of a mask [batch, seq, in]."""
        weight = self._weight(mask)
        if weight is None:
            add_counts(mask, self.counts)
            return
        self.counts[0] += (mask.sum(-1) * weight.to(mask.device)).sum()
        self.counts[1] += self.view.tokens.n_counted * mask.shape[-1]

    def forget(self) -> None:
        """Let go of the tensors of an unfinished pass."""
        self._x = self._pruned = None

    def _prune(self, x: Tensor) -> Pruned:
        slots, view = self.slots, self.view
        if view.tokens.past == 0:
            self.memory.clear()
        x = rotated(x, slots)
        scope = view.scope.tokens(x, view.tokens)
        if scope is False and view.tokens.past:  # of the tokens before, a criterion may need to know; of these, none
            self.counts += x.numel() if self._weight(x) is None else view.tokens.n_counted * x.shape[-1]
            outside = torch.zeros((), dtype=torch.bool, device=x.device).expand(x.shape[:-1])
            return Pruned(x, None if slots.residual is None else torch.zeros_like(centred(x, slots)), outside)
        pattern = view.pattern or slots.pattern
        exact = slots.threshold is None or self._weight(x) is None
        if scope is True and slots.residual is None and not view.fade and exact:
            u, _ = pruned(x, slots, pattern, view.tokens, self.memory, self.counts)
            self._weigh(x, pattern)
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
    """Changes when x is written to; tensors of inference mode do not say."""
    return 0 if x.is_inference() else x._version


_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


class SparseLinear(nn.Module):
    """A dense layer that sees its pruned input. Hooks of the dense layer are hooks of this one.

    Args:
        dense: the layer it stands in for; its weight and bias are used as they are, never copied.
        shared: the input it reads.
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
        """x [*, in] to y [*, out]."""
        if self.shared.view.dense:
            return F.linear(x, self.weight, self.dense.bias)
        u, removed, in_scope = self.shared(x)
        slots = self.slots
        weight = self.weight if slots.folded is None else slots.folded
        if slots.residual is None and slots.gamma is None and slots.beta is None:
            return F.linear(u, weight, self.bias)
        y = as_tensor(F.linear(u, weight), x)
        if slots.residual is not None:
            assert removed is not None
            U, V = slots.residual
            y = y + F.linear(F.linear(removed, V), U)
        correction: Tensor | float = 0.0
        if slots.gamma is not None:
            correction = slots.gamma * y  # 1+γ is never formed: it would round small γ away
        if slots.beta is not None:
            correction = correction + slots.beta
        if in_scope is not None:
            correction = in_scope[..., None] * correction
        y = y + correction
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def rotated(x: Tensor, slots: Slots) -> Tensor:
    """Qᵀx in the dtype of x; x itself without a rotation."""
    return x if slots.rotation is None else (as_tensor(x, x) @ slots.rotation).to(x.dtype)


def filling(x: Tensor, slots: Slots) -> Tensor | None:
    """η in the dtype of x: [*, 1], a scalar or [in]; None is 0. A statistic of the token is a constant for autograd."""
    if isinstance(slots.eta, Tensor):
        return centre(x, "none", slots.eta)
    return centre(x.detach(), slots.eta or "none", None)


def centred(x: Tensor, slots: Slots) -> Tensor:
    """z in fp32 (float64 for float64 x), for x that is rotated already."""
    eta = filling(x, slots)
    return as_tensor(x, x) if eta is None else as_tensor(x, x) - as_tensor(eta, x)


def score(x: Tensor, slots: Slots, tokens: Tokens, memory: Memory) -> Tensor:
    """s in fp32 (float64 for float64 x), [batch, seq, in], for x that is rotated already; higher is kept."""
    if slots.priority is not None:
        return slots.priority.expand(x.shape)
    z = centred(x.detach(), slots)
    weight = slots.weight if slots.dynamic is None else slots.dynamic.token_weight(z, tokens, memory)
    return (z if weight is None else z * weight).abs()


def pruned(
    x: Tensor, slots: Slots, pattern: Pattern, tokens: Tokens, memory: Memory, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u and the mask k of x [batch, seq, in], which is rotated already.

    With `counts` the mask may be an empty tensor: the channels are counted instead, in the same pass.
    """
    if slots.threshold is not None or slots.priority is not None:
        mask = _keep(score(x, slots, tokens, memory), slots, pattern)
        if counts is not None:
            add_counts(mask, counts)
        return _fill(x, mask, slots), mask
    weight = slots.weight
    if slots.dynamic is not None:
        z = x.detach() if slots.eta is None else centred(x.detach(), slots)
        weight = slots.dynamic.token_weight(z, tokens, memory)
    share = budget(pattern, x.shape[-1])
    if counts is not None:
        u = prune(x, **share, weight=weight, eta=slots.eta, var=slots.nu, counts=counts)
        return u, x.new_empty(0, dtype=torch.bool)
    return prune(x, **share, weight=weight, eta=slots.eta, var=slots.nu, return_mask=True)


class Budget(TypedDict, total=False):
    """n and m, or kept: as `kernels.prune` takes them."""

    n: int
    m: int
    kept: int


def budget(pattern: Pattern, width: int) -> Budget:
    """The budget of a pattern of exact counts in the words of the fused primitive."""
    return {"n": pattern.n, "m": pattern.m} if pattern.kind == "n:m" else {"kept": pattern.kept(width)}


def _keep(s: Tensor, slots: Slots, pattern: Pattern) -> Tensor:
    """The mask of given scores, for what the fused primitive does not rank."""
    if slots.threshold is not None:
        return s >= slots.threshold
    n, m = (pattern.n, pattern.m) if pattern.kind == "n:m" else (pattern.kept(s.shape[-1]), s.shape[-1])
    return keep(s[:1, :1], n, m).expand(s.shape)  # the priority is the same for every token


def _fill(x: Tensor, mask: Tensor, slots: Slots) -> Tensor:
    """u of a given mask."""
    eta = filling(x, slots)
    fill = x.new_zeros(()) if eta is None else eta
    if not slots.nu:
        return torch.where(mask, x, fill)
    z = centred(x, slots)
    nu = variance_ratio(z.detach(), mask)
    rescaled = (as_tensor(x, x) + (nu - 1) * z).to(x.dtype)
    return torch.where(mask, torch.where((nu == 1) | (z == 0), x, rescaled), fill)
