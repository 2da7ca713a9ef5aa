"""How many processes this machine takes, and what each of them gets."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import joblib
import psutil

from nmsweep.cell.identity import model_bytes
from nmsweep.sweep.plan import Plan

WORKER_BYTES = 1_500_000_000
"""Memory of a process besides the weights: the libraries, activations, a slice of logits."""


def n_processes(plan: Plan, pending: Sequence[int]) -> int:
    """Return the number of processes for this machine, at least one.

    One for each GPU where the cells use GPUs; one in all where they name a GPU by its number, or use another accelerator;
    else as many as cores and memory allow.
    """
    cells = {plan.cells[index].model_key: plan.cells[index] for index in pending}
    configs = [plan.config(cell) for cell in cells.values()]
    if any(cfg.device != "cpu" for cfg in configs):
        import torch

        return max(1, torch.cuda.device_count()) if shares_gpus(plan) else 1
    largest = max(model_bytes(cfg) for cfg in configs)
    fitting = int(0.9 * available_bytes() / (1.2 * largest + WORKER_BYTES))
    return max(1, min(int(joblib.cpu_count()), fitting))


def shares_gpus(plan: Plan) -> bool:
    """Return whether each worker gets a GPU of its own: not where a cell names one by its number."""
    devices = {str(cell.config["device"]) for cell in plan.cells}
    return "cuda" in devices and not any(device.startswith("cuda:") for device in devices)


def share_machine(worker: int, n_workers: int, *, with_gpus: bool) -> None:
    """Give this process its share of the cores and one GPU, where it is one of several workers.

    The GPU is set by number, since CUDA_VISIBLE_DEVICES is the user's, and CUDA reads it only once.

    Args:
        worker: number of this worker, from 0.
        n_workers: how many there are.
        with_gpus: see `shares_gpus`.
    """
    if n_workers == 1:
        return
    import torch

    if with_gpus and (n_gpus := torch.cuda.device_count()):
        torch.cuda.set_device(worker % n_gpus)
    torch.set_num_threads(max(1, joblib.cpu_count() // n_workers))


def available_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory that new processes can have: what the machine has, or what a cgroup limit leaves.

    psutil knows the machine only, not the limit of a container or of a Slurm job.

    Args:
        root: where /proc and /sys are.
    """
    left = [bytes_left for group in _memory_groups(root) if (bytes_left := _bytes_left(group)) is not None]
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def _memory_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory cgroup and of all above it, of version 2 and of version 1.

    A container sees its own as the top one, whatever /proc says of its path.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = top / path.lstrip("/")
            yield from (group, *(above for above in group.parents if above.is_relative_to(top)))


def _bytes_left(group: Path) -> int | None:
    """Return the bytes that a cgroup may still take, cached files counted as free; None where it has no limit."""
    limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
    if not limit.isdecimal():
        return None
    used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return int(limit) - int(used or 0) + cached


def _text(file: Path) -> str:
    """Return a small file's text, stripped; empty where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
