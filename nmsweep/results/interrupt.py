"""Ctrl-C: once to stop after what is being written, twice to stop at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130


class Terminated(KeyboardInterrupt):
    """A SIGTERM: it stops this process as Ctrl-C does, but says nothing about jobs that run elsewhere."""


_writing = 0
_pending: list[type[KeyboardInterrupt]] = []


@contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """Inside the block the first Ctrl-C raises KeyboardInterrupt, the first SIGTERM Terminated, never in the middle of a write,
    and at the end of the block at the latest.

    The second ends the process on the spot, with code 130: an unfinished temporary file may stay, which the next run
    removes. In a thread other than the main one, where signals do not arrive, the block changes nothing.

    Args:
        numbers: the signals; Ctrl-C's and SIGTERM if none is given.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _arrived) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    _pending.clear()
    report = sys.unraisablehook

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        """An interrupt that arrived in some `__del__` is lost there, and raised again by the next write or the end of the block."""
        if not (_pending and isinstance(lost.exc_value, KeyboardInterrupt)):
            report(lost)

    sys.unraisablehook = unraisable
    try:
        yield
        if _pending:
            raise _pending[0]
    finally:
        _pending.clear()
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A write: an interrupt that comes in the block is raised when the block ends."""
    global _writing
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
    if _pending and not _writing:
        raise _pending[0]


def _arrived(number: int, frame: FrameType | None) -> None:
    _pending.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
    if len(_pending) > 1:
        os._exit(EXIT_CODE)
    if number == signal.SIGINT:
        os.write(2, b"nmsweep: stopping; once more to stop at once\n")  # sys.stderr may be in use, or replaced
    if not _writing:
        raise _pending[0]
