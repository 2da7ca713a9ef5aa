"""Time the fused primitive against a copy of the same tensor, and against topk and scatter, interleaved."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmsweep.bench.options import Count, Device, Dtype, Names, Patterns
from nmsweep.bench.timing import Contender, interleave, median_ms, ratios
from nmsweep.config.pattern import parse_pattern
from nmsweep.errors import InputError, nearest
from nmsweep.kernels import prune

FORMS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "act": lambda x: {},
    "weight": lambda x: {"weight": torch.rand(x.shape[-1], device=x.device)},
    "sequence_weight": lambda x: {"weight": torch.rand(x.shape[0], x.shape[-1], device=x.device)},
    "shift": lambda x: {"eta": "median"},
    "mean": lambda x: {"eta": "mean"},
    "shift_static": lambda x: {"eta": torch.rand(x.shape[-1], device=x.device) - 0.5},
    "var": lambda x: {"var": True},
    "shift+var": lambda x: {"eta": "median", "var": True},
}
"""Arguments of the primitive, by name: `weight` stands for amber, wina and the like, `sequence_weight` for clact."""


def run(
    *,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    batch: Count = 4,
    seqlen: Count = 256,
    hidden: Count = 4096,
    pattern: Patterns = ("2:4", "4:8", "8:16", "16:32", "50%"),
    form: Names = ("act", "weight", "shift+var"),
    rounds: Count = 7,
    repeats: Count = 20,
) -> list[dict[str, Any]]:
    """Time the primitive on a normal random tensor [batch, seqlen, hidden].

    Args:
        device: where the tensor is.
        dtype: of the tensor, by name.
        batch, seqlen, hidden: its shape.
        pattern: patterns, such as ``"8:16"`` or ``"50%"``.
        form: names of FORMS.
        rounds: measured rounds; every contender runs once in each.
        repeats: runs of which a round takes the mean.

    Returns:
        One row a pattern and form: `ratio` (median over rounds of its time to that of a copy), quartiles, `ms`, `copy_ms`,
        `topk_ratio` (topk and scatter to the copy; `act` only).

    Raises:
        InputError: a form that does not exist, or patterns whose M does not divide `hidden`.
    """
    if unknown := [name for name in form if name not in FORMS]:
        raise InputError(f"bench: form={unknown[0]}; {nearest(unknown[0], FORMS)}")
    if bad := [name for name in pattern if hidden % (parse_pattern(name).m or 1)]:
        raise InputError(f"bench: hidden={hidden} is not a multiple of M of {', '.join(bad)}; choose another hidden")
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(batch, seqlen, hidden, device=device, generator=generator).to(getattr(torch, dtype))
    out = torch.empty_like(x)
    contenders = {"copy": Contender(lambda: out.copy_(x), torch.inference_mode, repeats)}
    for share in pattern:
        n_kept = parse_pattern(share).budget(hidden)
        contenders[f"topk {share}"] = Contender(partial(_topk, x, **n_kept), torch.inference_mode)
        for name in form:
            call = partial(prune, x, **n_kept, **FORMS[name](x))
            contenders[f"{name} {share}"] = Contender(call, torch.inference_mode, repeats)
    times = interleave(contenders, device, rounds)
    quartiles = ratios(times, "copy")
    rows = []
    for share in pattern:
        for name in form:
            middle, low, high = quartiles[f"{name} {share}"]
            rows.append(
                {
                    "pattern": share, "form": name, "shape": f"{batch * seqlen}x{hidden}", "dtype": dtype,
                    "ratio": middle, "ratio_q1": low, "ratio_q3": high,
                    "ms": median_ms(times[f"{name} {share}"]), "copy_ms": median_ms(times["copy"]),
                    "topk_ratio": quartiles[f"topk {share}"][0] if name == "act" else None, "rounds": rounds,
                }
            )  # fmt: skip
    return rows


def _topk(x: Tensor, n: int = 0, m: int = 0, kept: int = 0) -> Tensor:
    """Mask as research code does: topk of each group, scattered into zeros."""
    n, m = (kept, x.shape[-1]) if kept else (n, m)
    groups = x.reshape(-1, m)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, dim=1).indices, 1.0)
    return (groups * mask).view(x.shape)
