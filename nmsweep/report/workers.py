"""Where the work of a report is done: in this process, or for many cells in others beside it."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
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


@contextmanager
def workers(n_cells: int) -> Iterator[Executor]:
    """An executor fit for a report of `n_cells` cells; its processes end with the block."""
    if n_cells < MANY:
        yield Here()
        return
    options: dict[str, Any] = {"max_workers": min(8, os.cpu_count() or 1), "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(**options) as pool:
        yield pool
