"""The formula, for one linear layer and one token's input x [in_features]; every other file only fills its slots.

    (x, W) ← (Qᵀx, WQ)                      Q: Slots.rotation, with WQ in Slots.folded; without it nothing changes
    z  = x − η                              η: Slots.eta
    s  = |z| · w                            w: Slots.weight or Slots.dynamic; Slots.priority replaces s
    k  = keep(s, pattern)                   exactly N kept of each M consecutive channels; or s ≥ Slots.threshold
    u  = k ? x + (ν−1)·z : η                ν: Slots.nu; without it u = k ? x : η, kept channels bit for bit
    y  = (1+γ) ⊙ [ W u + U V (1−k)⊙z ] + β + b

A token outside the scope has k = 1 everywhere, ν = 1, γ = 0 and β = 0: it sees the dense layer.
Computed in fp32, in float64 for a float64 model. The path from x to u is one call of the fused primitive `kernels.prune`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import add_counts, prune, prune_with_mask, reference
from nmsweep.methods.base import Memory, Slots, Tokens, as_tensor


def rotated(x: Tensor, slots: Slots) -> Tensor:
    """Return Qᵀx in the dtype of x; x itself without a rotation."""
    return x if slots.rotation is None else (as_tensor(x, x) @ slots.rotation).to(x.dtype)


def shift(x: Tensor, slots: Slots) -> Tensor | None:
    """Return η in the dtype of x: [*, 1], a scalar or [in]; None stands for 0. A statistic of the token takes no gradient."""
    if isinstance(slots.eta, Tensor):
        return reference.centre(x, "none", slots.eta)
    return reference.centre(x.detach(), slots.eta or "none", None)


def centred(x: Tensor, slots: Slots) -> Tensor:
    """Return z in fp32 (float64 for float64 x), for rotated x."""
    return reference.centred(x, shift(x, slots))


def score(x: Tensor, slots: Slots, tokens: Tokens, memory: Memory) -> Tensor:
    """Return s in fp32 (float64 for float64 x), [batch, seq, in], for rotated x; higher is kept."""
    if slots.priority is not None:
        return slots.priority.expand(x.shape)
    z = centred(x.detach(), slots)
    weight = slots.weight if slots.dynamic is None else slots.dynamic.token_weight(z, tokens, memory)
    return (z if weight is None else z * weight).abs()


def pruned(
    x: Tensor, slots: Slots, pattern: Pattern, tokens: Tokens, memory: Memory, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return u and the mask k of rotated x [batch, seq, in].

    With `counts` the mask may be an empty tensor: the channels are counted in the same pass instead.
    """
    if slots.threshold is not None or slots.priority is not None:
        mask = _keep(score(x, slots, tokens, memory), slots, pattern)
        if counts is not None:
            add_counts(mask, counts)
        return reference.filled(x, mask, shift(x, slots), slots.nu)[0], mask
    weight = slots.weight
    if slots.dynamic is not None:
        z = x.detach() if slots.eta is None else centred(x.detach(), slots)
        weight = slots.dynamic.token_weight(z, tokens, memory)
    budget = pattern.budget(x.shape[-1])
    if counts is not None:
        u = prune(x, **budget, weight=weight, eta=slots.eta, var=slots.nu, counts=counts)
        return u, x.new_empty(0, dtype=torch.bool)
    return prune_with_mask(x, **budget, weight=weight, eta=slots.eta, var=slots.nu)


def output(
    u: Tensor, removed: Tensor | None, in_scope: Tensor | None, weight: Tensor, bias: Tensor | None, slots: Slots
) -> Tensor:
    """Return y [*, out] in the dtype of u.

    Args:
        u: [*, in], the pruned input.
        removed: (1−k)⊙z [*, in] fp32; None without a residual.
        in_scope: [*] bool, the tokens that γ and β apply to; None for all.
        weight: W, or W Q with a rotation, [out, in].
        bias: b [out], or None.
        slots: of the layer.
    """
    if slots.residual is None and slots.gamma is None and slots.beta is None:
        return F.linear(u, weight, bias)
    y = as_tensor(F.linear(u, weight), u)
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
    return (y if bias is None else y + bias).to(u.dtype)


def _keep(s: Tensor, slots: Slots, pattern: Pattern) -> Tensor:
    """Return the mask of scores that the fused primitive does not rank: against a threshold, or by a fixed priority."""
    if slots.threshold is not None:
        return s >= slots.threshold
    n, m = (pattern.n, pattern.m) if pattern.kind == "n:m" else (pattern.kept(s.shape[-1]), s.shape[-1])
    return reference.keep(s[:1, :1], n, m).expand(s.shape)  # the priority is the same for every token
