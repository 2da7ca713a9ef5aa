"""How many processes one machine takes, what each of them gets, and how cells are shared out to jobs."""

import os
from collections.abc import Sequence
from itertools import groupby, pairwise

from nmsweep.cell import model_bytes
from nmsweep.sweep.machine import available_bytes, n_cores
from nmsweep.sweep.plan import Plan

WORKER_BYTES = 1_500_000_000
"""Memory of a process beside the weights: the libraries, activations, a slice of logits."""

SEEN_GPUS = "NMSWEEP_SEEN_GPUS"
"""Environment variable: CUDA_VISIBLE_DEVICES as the user has it (``all`` for none), for jobs from which a launcher hides it."""


def see_gpus() -> None:
    """Let this process see the GPUs that the command that started it saw, where its launcher hid them."""
    if (seen := os.environ.pop(SEEN_GPUS, None)) is None:
        return
    if seen == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen


def share_machine(worker: int, n_workers: int, *, with_gpus: bool) -> None:
    """Give this process its share of the cores, and one GPU, where it is one of several workers.

    Worker 0 has the first GPU that it sees without being told; it may have asked for CUDA already, and be deaf.

    Args:
        worker: which one it is, from 0.
        n_workers: how many there are.
        with_gpus: whether GPUs are shared out, see `shares_out_gpus`.
    """
    if n_workers == 1:
        return
    import torch

    if worker and with_gpus and (names := visible_gpus(torch.cuda.device_count())):
        os.environ["CUDA_VISIBLE_DEVICES"] = names[worker % len(names)]
    torch.set_num_threads(max(1, n_cores() // n_workers))


def visible_gpus(n_gpus: int) -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs that a process sees: those that the user left in it, if any."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in seen.split(",")] if seen else [str(number) for number in range(n_gpus)]
    return names[:n_gpus]  # CUDA stops at a name that it does not know


def shares_out_gpus(plan: Plan) -> bool:
    """Whether each worker is to see one GPU: not where a plan names one by its number, which would be another one then."""
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
