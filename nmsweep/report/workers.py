"""Where the work of a report is done: in this process, or for many cells in others beside it."""

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nmsweep.results.layout import CELLS

_P = ParamSpec("_P")
_S = TypeVar("_S")
_T = TypeVar("_T")

MANY = 500
"""Cells from which other processes are worth their start."""


class Here(Executor):
    """This process, at once."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised again where the result is asked for, as another process would
            future.set_exception(error)
        return future


def get_ready(words: Sequence[str]) -> None:
    """Begin the processes' common import beside this process's own, where the words ask for a report that needs them.

    To be called before NumPy is imported: many small products are made beside the other processes, and a BLAS with threads
    would spend more time on its threads' turns than on them.
    """
    given = dict(word.removeprefix("--").removeprefix("report.").partition("=")[::2] for word in words)
    cells = Path(given.get("results_dir", "results")) / CELLS
    if {"check", "compare"} & set(given) or not cells.is_dir() or sum(1 for _ in os.scandir(cells)) < MANY:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atexit.register(gc.freeze)  # at the end nothing is worth a last search for cycles, which takes a tenth of a second
    if _start().get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        ensure_running()


@contextmanager
def workers(n_cells: int) -> Iterator[Executor]:
    """An executor fit for a report of `n_cells` cells; its processes end with the block."""
    if n_cells < MANY:
        yield Here()
        return
    options: dict[str, Any] = {"max_workers": min(8, os.cpu_count() or 1), "mp_context": _start(), "initializer": _settle}  # fmt: skip
    with ProcessPoolExecutor(**options) as pool:
        yield pool


def _settle() -> None:
    """In another process: as in this one no search for cycles; and this one goes first, since in the end it has most to do."""
    gc.disable()
    if hasattr(os, "nice"):
        os.nice(5)


def _start() -> Any:
    """Processes that share one import where the system can; never copies of this one, whose threads would be lost."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["nmsweep.report.preload"])
    return context


def in_threads(work: Callable[[_S], _T], jobs: Iterable[_S]) -> list[_T]:
    """The results of jobs, in order; for work that NumPy does without the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, jobs))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles in the block: millions of small records are made in it, and none of them is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
