"""Ctrl-C: once to stop after the current write, twice to stop at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130


class Terminated(KeyboardInterrupt):
    """A SIGTERM: stops this process as Ctrl-C does, but not jobs that run elsewhere."""


_writing = 0
_pending: list[type[KeyboardInterrupt]] = []


@contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """In the block, let the first Ctrl-C raise KeyboardInterrupt and the first SIGTERM `Terminated`, but not during a write.

    It is raised at the end of the block at the latest. A second signal ends the process at once, with code 130; it may leave a
    temporary file, which the next run removes. Outside the main thread, where no signals arrive, the block changes nothing.

    Args:
        numbers: the signals; by default SIGINT and SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _arrived) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    _pending.clear()
    report = sys.unraisablehook

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        """Hide what an interrupt causes in a `__del__`: it may be lost there, or have left an object half made.

        A lost one is raised again by the next write or the end of the block.
        """
        if not _pending:
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
    """Hold an interrupt back until the block ends, for a write."""
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
