"""Everything that may reach a user as a message instead of a traceback.

A message reads *subject: what came; what is allowed; what to do*, on one line and with the values in it.
"""

import difflib
from collections.abc import Iterable, Sequence


class NmsweepError(Exception):
    """Root of all errors shown without a traceback."""

    exit_code = 1


class InputError(NmsweepError):
    """The user asked for something that cannot be; nothing was written. Exit code 2.

    Args:
        messages: one line for each mistake; all mistakes of a command are reported together.
    """

    exit_code = 2

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class ModelError(InputError):
    """A model cannot be had: missing, gated, unreachable or corrupt."""


class DataError(InputError):
    """A task's data cannot be had, or is not what the task needs."""


class NonFiniteError(NmsweepError):
    """NaN or infinity where a number was expected: the cell has failed, it has no number."""


class StorageError(NmsweepError):
    """The results folder takes no more: full, read-only, gone. Nothing that follows could be kept."""


class Busy(NmsweepError):  # noqa: N818 - no error: a state of affairs
    """Another process is computing this at the moment; it is no failure.

    Args:
        message: what, and who has it.
        claim: the name that is claimed.
    """

    def __init__(self, message: str, claim: str) -> None:
        super().__init__(message)
        self.claim = claim


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Spell out what is allowed, nearest names first.

    Returns:
        ``"did you mean a or b? allowed: …"``: the near ones, and all if they are few or nothing is near.
    """
    names: Sequence[str] = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.5)
    allowed = ", ".join(names if len(names) <= 40 else [*names[:8], f"… ({len(names)} in all)"])
    near = f"did you mean {' or '.join(close)}?" if close else ""
    return near if near and len(names) > 40 else f"{near} allowed: {allowed}".strip()
