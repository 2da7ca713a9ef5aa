"""Ctrl-C: raised where it can be, and never lost."""

import os
import signal
import time
from contextlib import nullcontext

import pytest

from nmsweep.results.interrupt import interruptible, uninterrupted


class _InterruptedWhileCollected:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the handler raises before this has slept


@pytest.mark.parametrize("writes", [True, False])
def test_an_interrupt_in_a_destructor_is_raised_by_the_next_write_or_the_end(
    writes: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with interruptible(signal.SIGINT):
            thing = _InterruptedWhileCollected()
            del thing
            with uninterrupted() if writes else nullcontext():
                pass

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - begun < 5
    assert "Traceback" not in capfd.readouterr().err
    with uninterrupted():  # of the next command in this process
        pass
