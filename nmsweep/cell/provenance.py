"""What a number was made with: versions, git state, device, memory, the command."""

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
"""Packages whose version can move a number."""


def peak_memory_bytes(device: str) -> int:
    """Most memory in use so far: of the GPU for a device of kind ``cuda``, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def device_name(device: str) -> str:
    """The GPU for a device of kind ``cuda``, else the processor, as its maker calls it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """Versions, git state and command of this process."""
    return {
        "versions": {"nmsweep": __version__, "python": platform.python_version(), **_versions()},
        "git": git_state(Path(__file__).parents[2]),
        "command": shlex.join(["nmsweep", *sys.argv[1:]]),
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


@cache
def git_state(folder: Path) -> str:
    """Commit of nmsweep's own checkout, ``-dirty`` with changes; empty for an installed package."""
    if not (folder / ".git").exists():
        return ""
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
