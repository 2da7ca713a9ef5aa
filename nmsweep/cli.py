"""The command line: Hydra's application, the subcommands, exit codes. Nothing heavy is imported before it is needed.

Exit codes: 0 all went well, 1 a cell failed, 2 bad input (nothing was written), 130 interrupted.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsweep.errors import InputError, NmsweepError

if TYPE_CHECKING:
    from nmsweep.config import RunConfig


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

    from nmsweep.compose import prepare

    prepare(config_dir)
    if (
        args.help
        or args.hydra_help
        or args.info
        or args.cfg
        or args.shell_completion
        or getattr(args, "version", False)
    ):
        return _hand_to_hydra(words)
    return _run_cells(words, list(args.overrides), args.multirun, config_dir)


def _run_cells(words: list[str], overrides: list[str], multirun: bool, config_dir: Path | None) -> int:
    from nmsweep.compose import cells_of, is_multirun

    multirun = multirun or is_multirun(overrides, config_dir)
    configs = cells_of(overrides, multirun=multirun, config_dir=config_dir)

    _silence_libraries()
    from nmsweep.cell import check, identify
    from nmsweep.record import find_cell

    errors: list[str] = []
    missing: list[RunConfig] = []
    for cfg in configs:
        try:
            found = find_cell(cfg.results_dir, identify(cfg).cell_id)
            messages = [] if found and not cfg.force else check(cfg)
        except InputError:  # one mistake; `check` finds them all
            found, messages = None, check(cfg)
        errors += [message for message in messages if message not in errors]
        if found is None or cfg.force:
            missing.append(cfg)
        elif len(configs) == 1:
            print(f"nmsweep: this cell exists: {found}", file=sys.stderr)
    errors += _unwritable(configs[0].results_dir)
    if errors:
        raise InputError(*errors)
    if not missing:
        if len(configs) > 1:
            print(
                f"nmsweep: all {len(configs)} cells exist in {configs[0].results_dir}; nothing to do (force=true runs them again)",
                file=sys.stderr,
            )
        return 0
    if len(configs) > 1:
        print(
            f"nmsweep: {len(configs)} cells, {len(configs) - len(missing)} exist already, {len(missing)} to run",
            file=sys.stderr,
        )
    return _hand_to_hydra(words)


def _silence_libraries() -> None:
    """Cells have one display; download bars and chatter of libraries would tear it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _unwritable(results_dir: Path) -> list[str]:
    """Try to write where the results will lie, and leave no trace of it."""
    made = [folder for folder in (results_dir, *results_dir.parents) if not folder.exists()]
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=results_dir, prefix=".tmp-"):
            pass
    except OSError as error:
        return [
            f"results_dir: {results_dir} cannot be written ({error.strerror}); pass results_dir=DIR with a folder of yours"
        ]
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
    return []


def _hand_to_hydra(words: list[str]) -> int:
    import hydra

    from nmsweep.catalogue import conf_dir

    outcomes: list[Any] = []
    sys.argv = [sys.argv[0], *words]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_Job(outcomes))()
    return int(any(outcome.status == "failed" for outcome in outcomes))


class _Job:
    """What Hydra calls for each cell: picklable, so that launchers can send it away; here its outcomes give the exit code."""

    __name__ = "nmsweep"
    __qualname__ = "nmsweep"

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes = outcomes

    def __call__(self, cfg: Any) -> Any:
        outcome = run_composed(cfg)
        self.outcomes.append(outcome)
        return outcome


def run_composed(cfg: Any) -> Any:
    """Run the cell of one composed config."""
    _silence_libraries()
    from omegaconf import OmegaConf

    from nmsweep.config import parse_run
    from nmsweep.sweep import attempt

    raw = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(raw, dict)
    return attempt(parse_run({str(key): value for key, value in raw.items() if key not in ("hydra", "experiment")}))


def _key_values(words: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    """``key=value`` words of a subcommand."""
    found = {}
    for word in words:
        key, separator, value = (
            word.lstrip("-").replace("-", "_").partition("=") if "=" not in word else word.partition("=")
        )
        if not separator or key not in allowed:
            raise InputError(f"{word!r}: is not understood here; allowed: {', '.join(f'{name}=…' for name in allowed)}")
        found[key] = value
    return found


def _report(words: Sequence[str]) -> int:
    from nmsweep.report.command import report

    return report(words)


def _list(words: Sequence[str]) -> int:
    given = _key_values(words, ["config_dir"])
    from nmsweep.listing import show_list

    show_list(Path(given["config_dir"]) if "config_dir" in given else None)
    return 0


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"report": _report, "list": _list}

if __name__ == "__main__":
    main()
