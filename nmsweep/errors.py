"""Errors that reach a user as a message without traceback.

A message reads *subject: what came; what is allowed; what to do*, on one line and with the values in it.
"""

import difflib
from collections.abc import Iterable, Sequence


class NmsweepError(Exception):
    """Base of all errors shown without a traceback."""

    exit_code = 1


class InputError(NmsweepError):
    """A request that cannot be fulfilled; nothing was written. Exit code 2.

    Args:
        messages: one line for each mistake of a command.
    """

    exit_code = 2

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class ModelError(InputError):
    """A model is missing, gated, unreachable or corrupt."""


class DataError(InputError):
    """The data of a task is not available, or not in the task's form."""


class NonFiniteError(NmsweepError):
    """NaN or infinity in place of a number: the cell has failed."""


class StorageError(NmsweepError):
    """The results folder is full, read-only or gone, so that no further result can be kept."""


class Busy(NmsweepError):  # noqa: N818 - not an error but a state
    """Another process is computing this; not a failure.

    Args:
        message: what is being computed, and by which process.
        claim: name of the claim.
    """

    def __init__(self, message: str, claim: str) -> None:
        super().__init__(message)
        self.claim = claim


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Describe the allowed names, the nearest first.

    Returns:
        ``"did you mean a or b? allowed: …"``; the allowed names are left out if they are many and some are near.
    """
    names: Sequence[str] = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.5)
    allowed = ", ".join(names if len(names) <= 40 else [*names[:8], f"… ({len(names)} in all)"])
    near = f"did you mean {' or '.join(close)}?" if close else ""
    return near if near and len(names) > 40 else f"{near} allowed: {allowed}".strip()
