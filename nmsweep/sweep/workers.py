"""How many processes one machine takes, what each of them gets, and how cells are shared out to jobs."""

from collections.abc import Sequence
from itertools import groupby, pairwise

from nmsweep.cell.identity import model_bytes
from nmsweep.sweep.machine import available_bytes, n_cores
from nmsweep.sweep.plan import Plan

WORKER_BYTES = 1_500_000_000
"""Memory of a process beside the weights: the libraries, activations, a slice of logits."""


def share_machine(worker: int, n_workers: int, *, with_gpus: bool) -> None:
    """Give this process its share of the cores, and one GPU, where it is one of several workers.

    By its number, not by CUDA_VISIBLE_DEVICES, which is the user's, and which CUDA no longer reads where a library started it.

    Args:
        worker: which one it is, from 0.
        n_workers: how many there are.
        with_gpus: whether GPUs are shared out, see `shares_out_gpus`.
    """
    if n_workers == 1:
        return
    import torch

    if with_gpus and (n_gpus := torch.cuda.device_count()):
        torch.cuda.set_device(worker % n_gpus)
    torch.set_num_threads(max(1, n_cores() // n_workers))


def shares_out_gpus(plan: Plan) -> bool:
    """Whether each worker is to have a GPU of its own: not where a plan names one by its number."""
    devices = {str(cell.config["device"]) for cell in plan.cells}
    return "cuda" in devices and not any(device.startswith("cuda:") for device in devices)


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
    """Processes for this machine, at least one: one a GPU where the cells use GPUs, else what cores and memory allow.

    One where they use a GPU that is named by its number, or of another kind than CUDA's.
    """
    cells = {plan.cells[index].model_key: plan.cells[index] for index in pending}
    configs = [plan.config(cell) for cell in cells.values()]
    if any(cfg.device != "cpu" for cfg in configs):
        import torch

        return max(1, torch.cuda.device_count()) if shares_out_gpus(plan) else 1
    largest = max(model_bytes(cfg) for cfg in configs)
    fitting = int(0.9 * available_bytes() / (1.2 * largest + WORKER_BYTES))
    return max(1, min(n_cores(), fitting))
