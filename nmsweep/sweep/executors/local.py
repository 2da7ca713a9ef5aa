"""This machine: one cell after another in this process, or several worker processes.

Workers are forked from a server that imports the libraries while this process does the same, so that none of them spends its
first seconds on imports. They are not forked from this process, which has threads and may have started CUDA: neither survives
a fork. Where there are GPUs they are spawned instead, since a library may start CUDA when it is imported (torchao does).
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from nmsweep.progress import Display
from nmsweep.results.interrupt import EXIT_CODE, interruptible
from nmsweep.sweep.executors.base import Executor, Launch, rotated
from nmsweep.sweep.plan import Batch, Plan

IMPORTED = ["nmsweep.sweep.work", "nmsweep.kernels.cpu.backend"]
"""Modules that the server imports for the workers."""


class WorkerProcesses(Executor):
    """`hydra/launcher=joblib`: this process is the first worker, the others are its children."""

    first_is_here = True

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches(rotated(launch.pending, n_workers(launch)), one_machine=True)

    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> Mapping[int, str]:
        from nmsweep.sweep.work import run_batch

        with _workers(batches[1:]) as processes:
            run_batch(batches[0], display, plan, patient=True)
        for process, batch in zip(processes, batches[1:], strict=True):
            if code := process.exitcode:
                end = f"was ended by signal {-code}" if code < 0 else f"ended with code {code} (log: {batch.log_dir})"
                display.say(f"    worker process {process.pid} {end}; others did its cells")
        return {}


class SameProcess(WorkerProcesses):
    """`hydra/launcher=basic`: every cell in this process."""

    has_jobs = False

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches([launch.pending])


def n_workers(launch: Launch) -> int:
    """Return the number of processes for this machine: `cluster.workers`, or what it has GPUs, cores and memory for."""
    from nmsweep.sweep.machine import n_processes  # torch comes with it

    return min(launch.cluster.workers or n_processes(launch.plan, launch.pending), len(launch.pending))


def start_server() -> None:
    """Start the server that workers are forked from, where the system can fork; the sooner, the less they wait for it."""
    if "forkserver" not in get_all_start_methods():
        return
    from multiprocessing.forkserver import ensure_running

    get_context("forkserver").set_forkserver_preload(IMPORTED)
    with _ctrl_c_ignored():
        ensure_running()


@contextmanager
def _workers(batches: Sequence[Batch]) -> Iterator[list[BaseProcess]]:
    """Run each batch in a process of its own; wait for them at the end of the block.

    An exception in the block tells them to stop; they first finish what they are writing.
    """
    processes: list[BaseProcess] = []
    try:
        context: Any = _context() if batches else None
        for batch in batches:
            process = context.Process(target=_work, args=(batch,))
            with _ctrl_c_ignored():
                process.start()
            processes.append(process)
        yield processes
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes that are started in the block leave a Ctrl-C to this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _context() -> Any:
    """Return how workers are started: forked from the server, or spawned where there are GPUs or no forks."""
    import torch

    if "forkserver" not in get_all_start_methods() or torch.cuda.device_count():
        return get_context("spawn")
    start_server()
    return get_context("forkserver")


def _work(batch: Batch) -> None:
    """Run a batch in a worker; SIGTERM or the parent's end stops it, a Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from nmsweep.sweep.work import run_batch

    try:
        with interruptible(signal.SIGTERM):
            run_batch(batch, Display(quiet=True))
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)
    except Exception:  # it is in the worker's log
        sys.exit(1)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
