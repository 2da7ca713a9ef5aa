"""The environment of a result: versions, git state, device, memory and command."""

import platform
import resource
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nmsweep import __version__

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "numpy", "tokenizers", "triton", "numba")
"""Packages whose version may change a number."""


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory so far in bytes: of the GPU for ``cuda``, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def device_name(device: str) -> str:
    """Return the model name of the GPU for ``cuda``, else of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """Return the versions, git state and command of this process."""
    return {
        "versions": {"nmsweep": __version__, "python": platform.python_version(), **_versions()},
        "git": git_state(Path(__file__).parents[2]),
        "command": shlex.join(["nmsweep", *sys.argv[1:]]),
    }


@cache
def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return versions


@cache
def git_state(folder: Path) -> str:
    """Return the commit of nmsweep's checkout, with ``-dirty`` if it has changes; empty for an installed package."""
    if not (folder / ".git").exists():
        return ""
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
