"""Choose the backend of a call and run it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Protocol

from torch import Tensor

from nmsweep.errors import InputError, nearest
from nmsweep.kernels import reference
from nmsweep.kernels.arguments import Arguments

BACKENDS = ("reference", "cpu", "triton")
ENVIRONMENT = "NMSWEEP_KERNEL"
"""Environment variable that selects a backend, like ``backend=`` of `prune`."""


class Backend(Protocol):
    """A module that runs the primitive faster than the reference."""

    def supports(self, args: Arguments) -> bool:
        """Return whether this backend can run the call."""

    def prune(
        self, args: Arguments, *, mask: Tensor | None = None, nu: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """Return u; fill `mask` bool [*, hidden] and `nu` [*, 1] in the compute dtype and add to `counts` int64 [2], where given."""


def run(
    args: Arguments,
    backend: str | None = None,
    *,
    mask: Tensor | None = None,
    nu: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Run one checked call on the requested backend, or on the fastest one that supports it; see `Backend.prune`.

    Raises:
        InputError: the requested backend does not exist or cannot run this call.
    """
    fast = choose(args, backend or os.environ.get(ENVIRONMENT, ""))
    if fast is not None and args.x.numel() > 0:
        return fast.prune(args, mask=mask, nu=nu, counts=counts)
    u, kept, ratio = reference.prune(args)
    if mask is not None:
        mask.copy_(kept)
    if nu is not None:
        nu.copy_(ratio)
    if counts is not None:
        add_counts(kept, counts)
    return u


def add_counts(mask: Tensor, counts: Tensor) -> None:
    """Add the kept and the total channels of a mask to int64 [2], without waiting for the device."""
    counts[0] += mask.sum()
    counts[1] += mask.numel()


def choose(args: Arguments, name: str) -> Backend | None:
    """Return the backend of a call, or None for the reference. An empty name chooses by device.

    Raises:
        InputError: the named backend does not exist or cannot run this call.
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
            "choose reference, or leave it out for the fastest that can"
        )
    return fast


_NEEDS = {"cpu": "numba", "triton": "triton"}


def by_device(kind: str) -> Backend | None:
    """Return the fast backend of a device type, or None if there is none or its package is not installed."""
    return _module("triton") if kind == "cuda" else _module("cpu") if kind == "cpu" else None


@cache
def _module(name: str) -> Backend | None:
    """Import the module of a backend; None if the package that it needs is not installed."""
    if importlib.util.find_spec(_NEEDS[name]) is None:
        return None
    module: Backend = importlib.import_module(f"{__package__}.{name}.backend")
    return module
