"""The command line: Hydra's application, the subcommands, exit codes. Nothing heavy is imported before it is needed.

Exit codes: 0 all went well, 1 a cell failed, 2 bad input (nothing was written), 130 interrupted.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nmsweep.commands.words import key_values
from nmsweep.errors import InputError, NmsweepError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `nmsweep`; ends the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks, once a worker, says nothing
    warnings.showwarning = _show_warning
    try:
        code = SUBCOMMANDS[words[0]](words[1:]) if words and words[0] in SUBCOMMANDS else _application(words)
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


def _application(words: list[str]) -> int:
    """Check the command, then hand it to Hydra."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        args = parser.parse_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 0:
            raise
        raise InputError(f"{' '.join(words)!r}: {error}; see `nmsweep --help`") from error
    config_dir = Path(args.config_dir) if args.config_dir else None
    if config_dir and not config_dir.is_dir():
        raise InputError(f"--config-dir: {config_dir} is no folder; name one with criterion/, mitigations/, model/, …")

    from nmsweep.commands.run import hand_to_hydra, run_cells
    from nmsweep.config.compose import prepare

    prepare(config_dir)
    if (
        args.help
        or args.hydra_help
        or args.info
        or args.cfg
        or args.shell_completion
        or getattr(args, "version", False)
    ):
        return hand_to_hydra(words)
    return run_cells(words, list(args.overrides), args.multirun, config_dir)


def _report(words: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small products: the threads of a BLAS only wait for each other
    from nmsweep.commands.report import report

    return report(words)


def _list(words: Sequence[str]) -> int:
    given = key_values(words, ["config_dir"])
    from nmsweep.commands.list import show_list

    show_list(Path(given["config_dir"]) if "config_dir" in given else None)
    return 0


def _inspect(words: Sequence[str]) -> int:
    cells = [word for word in words if "=" not in word]
    given = key_values([word for word in words if "=" in word], ["results_dir", "task", "limit"])
    if len(cells) != 1:
        raise InputError(
            f"inspect: {len(cells)} cells were named; name one, by its id or folder: `nmsweep inspect CELL limit=20`"
        )
    limit = given.get("limit", "10")
    if not limit.isdigit():
        raise InputError(f"limit: {limit!r} is no number of items; pass limit=20")
    from nmsweep.commands.inspect import show_flips

    show_flips(Path(given.get("results_dir", "results")), cells[0], given.get("task"), int(limit))
    return 0


def _prefetch(words: Sequence[str]) -> int:
    from nmsweep.commands.prefetch import prefetch
    from nmsweep.commands.run import silence_libraries

    silence_libraries()
    return prefetch(words)


def _bench(words: Sequence[str]) -> int:
    from nmsweep.commands.bench import bench
    from nmsweep.commands.run import silence_libraries

    silence_libraries()
    return bench(words)


def _sensitivity(words: Sequence[str]) -> int:
    """`nmsweep sensitivity [skip=K] <key=value …>`: the overrides of one cell."""
    own = [word for word in words if word.startswith("skip=")]
    value = key_values(own, ["skip"]).get("skip", "0")
    if not value.isdigit():
        raise InputError(f"skip: {value!r} is no number of layers; allowed: 0, 1, 2, …")
    from nmsweep.commands.run import silence_libraries, unwritable
    from nmsweep.config.compose import cells_of

    [cfg] = cells_of([word for word in words if word not in own], multirun=False, config_dir=None)
    if errors := unwritable(cfg.results_dir):
        raise InputError(*errors)
    silence_libraries()
    from nmsweep.cell.session import Session
    from nmsweep.commands.sensitivity import sensitivity, summary

    session = Session()
    with session.display:
        file, table = sensitivity(cfg, int(value), session)
    print(summary(cfg.targets, table))
    print(file)
    return 0


def _of_sweeps(name: str) -> Callable[[Sequence[str]], int]:
    """A subcommand of `commands`, imported when it is called."""

    def call(words: Sequence[str]) -> int:
        from nmsweep.commands import sweeps

        return int(getattr(sweeps, name)(words))

    return call


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "bench": _bench,
    "report": _report,
    "list": _list,
    "inspect": _inspect,
    "prefetch": _prefetch,
    "sensitivity": _sensitivity,
    **{name: _of_sweeps(name) for name in ("plan", "status", "retry", "gc")},
}

if __name__ == "__main__":
    main()
