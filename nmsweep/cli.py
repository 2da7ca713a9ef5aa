"""The command line: its first word names a command, anything else runs cells. Nothing heavy is imported before it is needed.

Exit codes: 0 success, 1 a cell failed, 2 bad input (nothing was written), 130 interrupted.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nmsweep.errors import NmsweepError

COMMANDS = ("bench", "gc", "inspect", "list", "plan", "prefetch", "report", "retry", "sensitivity", "status")
"""First words that name a command, each a module of `nmsweep.commands` with a function ``main(words) -> exit code``."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `nmsweep`; end the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.showwarning = _show_warning
    name, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else ("run", words)
    if name == "report":  # its many small products are slower on the threads of a BLAS
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        code = int(import_module(f"nmsweep.commands.{name}").main(rest))
    except NmsweepError as error:
        for message in str(error).splitlines():
            print(f"nmsweep: {message}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("nmsweep: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # or it warns of forks
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment in which libraries leave the terminal to the display of cells."""


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    if filename.startswith(str(Path(__file__).parent)) or (category is UserWarning and "pattern" in str(message)):
        print(f"nmsweep: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
