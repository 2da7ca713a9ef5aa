"""The fused primitive alone, against a copy of the same tensor and against topk and scatter, interleaved."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmsweep.bench.timing import Contender, interleave, ratios
from nmsweep.config.pattern import parse_pattern
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
"""What the primitive is asked for, by name: `weight` stands for amber, wina and the like, `sequence_weight` for clact."""


def run(
    *,
    device: str,
    dtype: torch.dtype,
    batch: int,
    seqlen: int,
    hidden: int,
    patterns: Sequence[str],
    forms: Sequence[str],
    rounds: int = 7,
    repeats: int = 10,
) -> list[dict[str, Any]]:
    """Time the primitive on a normal random tensor [batch, seqlen, hidden].

    Args:
        device: where the tensor is.
        dtype: of the tensor.
        batch, seqlen, hidden: its shape.
        patterns: such as ``"8:16"`` or ``"50%"``.
        forms: names of FORMS.
        rounds: measured rounds; every contender runs once in each.
        repeats: runs of which a round takes the mean.

    Returns:
        one row a pattern and form: `ratio` (median over rounds of its time to that of a copy), quartiles, `ms`, `copy_ms`,
        `topk_ratio` (topk and scatter to the copy; `act` only).
    """
    x = torch.randn(batch, seqlen, hidden, device=device, generator=_generator(device)).to(dtype)
    out = torch.empty_like(x)
    contenders = {"copy": Contender(lambda: out.copy_(x), _inference, repeats)}
    for pattern in patterns:
        share = parse_pattern(pattern).budget(hidden)
        contenders[f"topk {pattern}"] = Contender(partial(_topk, x, **share), _inference)
        for form in forms:
            call = partial(prune, x, **share, **FORMS[form](x))
            contenders[f"{form} {pattern}"] = Contender(call, _inference, repeats)
    times = interleave(contenders, device, rounds)
    found = ratios(times, "copy")
    rows = []
    for pattern in patterns:
        for form in forms:
            middle, low, high = found[f"{form} {pattern}"]
            rows.append(
                {
                    "pattern": pattern,
                    "form": form,
                    "shape": f"{batch * seqlen}x{hidden}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "ratio": middle,
                    "ratio_q1": low,
                    "ratio_q3": high,
                    "ms": 1e3 * times[f"{form} {pattern}"].median_s,
                    "copy_ms": 1e3 * times["copy"].median_s,
                    "topk_ratio": found[f"topk {pattern}"][0] if form == "act" else None,
                    "rounds": rounds,
                }
            )
    return rows


@contextmanager
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _topk(x: Tensor, n: int = 0, m: int = 0, kept: int = 0) -> Tensor:
    """The mask as research code makes it: topk of each group, scattered into zeros."""
    n, m = (kept, x.shape[-1]) if kept else (n, m)
    groups = x.reshape(-1, m)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, dim=1).indices, 1.0)
    return (groups * mask).view(x.shape)


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)
