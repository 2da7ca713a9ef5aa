"""Real processes that run nmsweep, each forked off one that has imported the libraries: tenths of a second, not several."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nmsweep.commands.status", "nmsweep.commands.run", "nmsweep.sweep.work"])


def _main(words: Sequence[str], log: str) -> None:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    from nmsweep.cli import main

    sys.argv = ["nmsweep", *words]
    main(words)


class Run:
    """One process; what it prints is in a file.

    Args:
        words: the command, less ``nmsweep``.
        log: that file; appended to.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start = log.stat().st_size if log.exists() else 0
        self._process = _CONTEXT.Process(target=_main, args=(list(words), str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        """What it has printed so far."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode()

    def until(self, text: str, timeout_s: float = 120) -> bool:
        """Wait until it has printed a text; False if it ended without."""
        stop = time.monotonic() + timeout_s
        while time.monotonic() < stop:
            alive = self._process.is_alive()
            if text in self.said:
                return True
            if not alive:
                return False
            time.sleep(0.005)
        raise TimeoutError(f"{text!r} never came; it said: {self.said}")

    def end(self, timeout_s: float = 300) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, self.said
        return self._process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


def run(words: Sequence[str], log: Path) -> Run:
    """Run a command to its end.

    Raises:
        AssertionError: it failed.
    """
    process = Run(words, log)
    assert process.end() == 0, process.said
    return process
