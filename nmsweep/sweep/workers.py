"""How many processes one machine takes, what each of them gets, and how cells are shared out to jobs."""

import os
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

from nmsweep.cell import model_bytes
from nmsweep.sweep.plan import Plan

WORKER_BYTES = 1_500_000_000
"""Memory of a process beside the weights: the libraries, activations, a slice of logits."""


def share_machine(worker: int, n_workers: int) -> None:
    """Give this process one GPU and its share of the cores, where it is one of several workers.

    Worker 0 has the first GPU that it sees without being told; it may have asked for CUDA already, and be deaf.
    """
    if n_workers == 1:
        return
    import torch

    if worker and (n_gpus := torch.cuda.device_count()):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(number) for number in range(n_gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[worker % len(names)]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers))


def grouped(plan: Plan, pending: Sequence[int], size: int) -> list[list[int]]:
    """Cells of one model together, at most `size`; shares of one model are equally long."""
    shares = []
    for _, same in groupby(pending, lambda index: plan.cells[index].model_key):
        cells = list(same)
        n_shares = -(-len(cells) // size)
        bounds = [len(cells) * at // n_shares for at in range(n_shares + 1)]
        shares += [cells[start:stop] for start, stop in pairwise(bounds)]
    return shares


def n_local_workers(plan: Plan, pending: Sequence[int]) -> int:
    """Processes for this machine: one a GPU where the cells use GPUs; else what cores and memory allow; at least one."""
    cells = {plan.cells[index].model_key: plan.cells[index] for index in pending}
    configs = [plan.config(cell) for cell in cells.values()]
    if any(cfg.device.startswith("cuda") for cfg in configs):
        import torch

        return max(1, torch.cuda.device_count())
    largest = max(model_bytes(cfg) for cfg in configs)
    fitting = int(0.9 * available_bytes() / (1.2 * largest + WORKER_BYTES))
    return max(1, min(os.cpu_count() or 1, fitting))


def available_bytes() -> int:
    """Memory that new processes can have."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
