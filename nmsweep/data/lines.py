"""JSON lines of others, looked at before a library reads them: one of them can end the process in another's parser."""

import json
from functools import cache
from pathlib import Path

from nmsweep.errors import DataError

LONGEST_BYTES = 16 * 2**20
"""Of one line; the longest item of the harness's tasks has under 1 MiB."""


def check_lines(file: Path) -> None:
    """Check that a file holds JSON objects, one a line, at least one.

    Raises:
        DataError: a line that is too long, no UTF-8, no JSON, nested too deep, or no object; the message names it.
    """
    stat = file.stat()
    if problem := _problem(file, stat.st_size, stat.st_mtime_ns):
        raise DataError(
            f"data.mirror: {file} {problem}; a JSON object a line is expected; fetch it again with `nmsweep prefetch`"
        )


@cache
def _problem(file: Path, size: int, mtime_ns: int) -> str:
    """What is wrong with a file, remembered while it does not change."""
    n_items = 0
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_BYTES + 1):
            number += 1
            if len(line) > LONGEST_BYTES:
                return f"has more than {LONGEST_BYTES >> 20} MiB in line {number}"
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except RecursionError:
                return f"is nested too deep in line {number}"
            except ValueError as error:  # no UTF-8 is one, too
                return f"is no JSON in line {number} ({error})"
            if not isinstance(item, dict):
                return f"has no object in line {number} but {str(item)[:20]!r}"
            n_items += 1
    return "" if n_items else "has no item"
