"""Ctrl-C: raised where it can be, and never lost."""

import os
import signal
import time

import pytest

from nmsweep.disk.interrupt import interruptible, uninterrupted


class _InterruptedWhileCollected:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the handler raises before this has slept


def test_an_interrupt_in_a_destructor_is_raised_by_the_next_write(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with interruptible(signal.SIGINT):
            thing = _InterruptedWhileCollected()
            del thing
            with uninterrupted():
                pass

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - begun < 5
    assert "Traceback" not in capfd.readouterr().err
