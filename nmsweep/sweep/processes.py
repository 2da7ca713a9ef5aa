"""Processes beside the one that the user started, forked off one that imports the libraries while the first does so itself.

So none of them spends its first seconds on imports. They are no copies of the first process, which has threads and may have
asked for CUDA: neither outlives a fork. Where a library starts CUDA when it is imported (torchao does), they are started anew.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from nmsweep.results.interrupt import EXIT_CODE, interruptible

IMPORTED = ["nmsweep.sweep.launching", "nmsweep.kernels.cpu.backend", "hydra_plugins.hydra_joblib_launcher._core"]
"""What the processes need."""


def get_ready() -> None:
    """Begin their common import, where the system can fork; the sooner, the less they are waited for."""
    if _context().get_start_method() != "forkserver":
        return
    from multiprocessing.forkserver import ensure_running

    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # a library that asks for GPUs while imported starts no CUDA
    with _deaf_to_ctrl_c():
        ensure_running()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started in the block leave a Ctrl-C to the process that the user started."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def beside(jobs: Sequence[Callable[[], object]]) -> Iterator[list[BaseProcess]]:
    """Call functions, which are pickled, in a process each while the block lasts.

    They are waited for when it ends. Where an exception ends it, they are told to stop, and finish what they are writing.
    """
    processes: list[BaseProcess] = []
    get_ready()
    try:
        context: Any = _context_with_gpus() if jobs else None
        for job in jobs:
            process = context.Process(target=_run, args=(job,))
            with _deaf_to_ctrl_c():
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


def _context() -> Any:
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _context_with_gpus() -> Any:
    """How processes are started that may use the machine's GPUs."""
    import torch

    context = _context()
    if context.get_start_method() == "spawn" or not torch.cuda.device_count():
        return context
    probe = context.Process(target=_look_for_cuda)
    probe.start()
    probe.join()
    return context if probe.exitcode == 0 else get_context("spawn")


def _look_for_cuda() -> None:
    """End with 1 where CUDA cannot be used, since it was started before the fork."""
    import torch

    sys.exit(int(torch.cuda._is_in_bad_fork()))


def _run(job: Callable[[], object]) -> None:
    """Call one; it is stopped by the process that started it (SIGTERM), or by its end, not by a Ctrl-C that reaches both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with interruptible(signal.SIGTERM):
            job()
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
