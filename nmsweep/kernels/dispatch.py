"""Which backend runs a call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from nmsweep.errors import InputError, nearest
from nmsweep.kernels import reference
from nmsweep.kernels.arguments import Arguments, compute_dtype

BACKENDS = ("reference", "cpu", "triton")
ENVIRONMENT = "NMSWEEP_KERNEL"
"""Environment variable that forces a backend, as ``backend=`` of `prune` does."""


class Backend(Protocol):
    """A module of this package that runs the primitive faster than the reference."""

    def supports(self, args: Arguments) -> bool:
        """Whether it can run the call."""

    def prune(
        self, args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """u; `mask` bool [*, hidden] and `nu` fp32 [*, 1] are filled and `counts` int64 [2] is added to, where given."""


def run(
    args: Arguments, backend: str | None = None, with_mask: bool = False, counts: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run one checked call on the backend that is asked for, or on the fastest that can.

    Returns:
        u; with `with_mask` also the mask, bool [*, hidden], and ν [*, 1] in the compute dtype; else None for both.

    Raises:
        InputError: the backend asked for does not exist or cannot run this call.
    """
    x = args.x
    fast = choose(args, backend or os.environ.get(ENVIRONMENT, ""))
    if fast is None or x.numel() == 0:
        u, kept, ratio = reference.prune(args)
        if counts is not None:
            add_counts(kept, counts)
        return (u, kept, ratio) if with_mask else (u, None, None)
    if not with_mask:
        return fast.prune(args, counts=counts), None, None
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    nu = x.new_ones((*x.shape[:-1], 1), dtype=compute_dtype(x))
    return fast.prune(args, mask=mask, nu=nu, counts=counts), mask, nu


def add_counts(mask: Tensor, counts: Tensor) -> None:
    """Add kept and all channels of a mask to int64 [2], without waiting for the device."""
    counts[0] += mask.sum()
    counts[1] += mask.numel()


def choose(args: Arguments, name: str) -> Backend | None:
    """The backend of a call; None is the reference. An empty name chooses by device.

    Raises:
        InputError: as for `run`.
    """
    if not name:
        fast = by_device(args.x.device.type)
        return fast if fast is not None and fast.supports(args) else None
    if name not in BACKENDS:
        raise InputError(
            f"kernel backend: {name!r} does not exist; {nearest(name, BACKENDS)}; leave it out for the fastest"
        )
    if name == "reference":
        return None
    fast = _module(name)
    if fast is None:
        raise InputError(
            f"kernel backend: {name} cannot be imported here; install the package {_NEEDS[name]}, or leave it out"
        )
    if not fast.supports(args):
        x = args.x
        raise InputError(
            f"kernel backend: {name} cannot prune {x.dtype} {list(x.shape)} on {x.device} with {args.n} kept of {args.m}; "
            "take reference, or leave it out for the fastest that can"
        )
    return fast


_NEEDS = {"cpu": "numba", "triton": "triton"}


def by_device(kind: str) -> Backend | None:
    """The fast backend of a kind of device, where there is one and its package is installed."""
    return _module("triton") if kind == "cuda" else _module("cpu") if kind == "cpu" else None


@cache
def _module(name: str) -> Backend | None:
    """A backend's module, where the package that it needs is installed."""
    if importlib.util.find_spec(_NEEDS[name]) is None:
        return None
    module: Backend = importlib.import_module(f"{__package__}.{name}.backend")
    return module
