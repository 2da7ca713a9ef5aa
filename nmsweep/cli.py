"""The command line: Hydra's application, the subcommands, exit codes. Nothing heavy is imported before it is needed.

Exit codes: 0 all went well, 1 a cell failed, 2 bad input (nothing was written), 130 interrupted.
"""

import argparse
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsweep.errors import InputError, NmsweepError

if TYPE_CHECKING:
    from nmsweep.launching import Launch
    from nmsweep.plan import Plan
    from nmsweep.sweep import Outcome


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
    """Plan the cells of a command, and run those that are missing."""
    from nmsweep.compose import cells_of, is_multirun

    multirun = multirun or is_multirun(overrides, config_dir)
    configs = cells_of(overrides, multirun=multirun, config_dir=config_dir)

    _silence_libraries()
    from nmsweep.leftovers import remove_abandoned
    from nmsweep.plan import store
    from nmsweep.planning import make_plan, missing

    results_dir = configs[0].results_dir
    plan = make_plan(configs, words, os.getcwd())
    if unwritable := _unwritable(results_dir):
        raise InputError(*unwritable)
    pending = missing(plan, results_dir)
    n_cells = len(plan.cells)
    if not pending:
        say = f"all {n_cells} cells exist in {results_dir}" if n_cells > 1 else f"this cell exists in {results_dir}"
        print(
            f"nmsweep: {say}; nothing to do (force=true runs {'them' if n_cells > 1 else 'it'} again)", file=sys.stderr
        )
        return 0
    if n_cells > 1:
        print(
            f"nmsweep: {n_cells} cells, {n_cells - len(pending)} exist already, {len(pending)} to run", file=sys.stderr
        )
    remove_abandoned(results_dir)
    store(plan, results_dir)
    return _launch(words, plan, pending, results_dir)


def _launch(words: list[str], plan: "Plan", pending: Sequence[int], results_dir: Path) -> int:
    from nmsweep.interrupt import interruptible
    from nmsweep.launching import Launch

    task = Launch(plan, results_dir, tuple(pending), secrets.token_hex(6))
    with interruptible():
        return _hand_to_hydra(words, task)


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
        with tempfile.NamedTemporaryFile(dir=results_dir, prefix=".tmp_"):
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


def _hand_to_hydra(words: list[str], task: "Launch | None" = None) -> int:
    import hydra

    from nmsweep.catalogue import conf_dir

    outcomes: list[Outcome] = []
    sys.argv = [sys.argv[0], *words]
    job = _Job(task, outcomes)
    _current.append(job)
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    finally:
        _current.pop()
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(outcomes) > 1:
        for outcome in failed:
            print(f"FAILED {outcome.name}: {outcome.error}", file=sys.stderr)
    return int(bool(failed))


_current: "list[_Job]" = []
"""The job of the command that runs; Hydra makes the sweeper, which has to find it."""


class _Job:
    """What Hydra calls: for a single command once in this process, for a sweep once a batch, perhaps on another machine.

    Args:
        task: what the command is to do; left behind when the job is sent away.
        outcomes: filled with how its cells ended.
    """

    __name__ = "nmsweep"
    __qualname__ = "nmsweep"

    def __init__(self, task: "Launch | None", outcomes: "list[Outcome]") -> None:
        self.task = task
        self.outcomes = outcomes

    def __getstate__(self) -> dict[str, Any]:
        return {"task": None, "outcomes": []}

    def __call__(self, cfg: Any) -> None:
        _silence_libraries()
        from nmsweep.launching import run_batch

        if self.task is not None and "batch" not in cfg:
            self.outcomes += self.task.run_here()
            return
        run_batch(str(cfg.batch), Path(str(cfg.results_dir)), remote=self.task is None)


def sweep_cells(launcher: Any, arguments: Sequence[str], config: Any) -> None:
    """Run the cells of the current command through one of Hydra's launchers; what the sweeper calls."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from nmsweep.config import ClusterConfig
    from nmsweep.launching import launch

    job = _current[-1]
    assert job.task is not None
    shared = [
        str(override.input_line)
        for override in OverridesParser.create().parse_overrides(list(arguments))
        if not override.is_sweep_override()
    ]
    job.outcomes += launch(launcher, job.task, shared, ClusterConfig(**config.cluster))


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


def _inspect(words: Sequence[str]) -> int:
    cells = [word for word in words if "=" not in word]
    given = _key_values([word for word in words if "=" in word], ["results_dir", "task", "limit"])
    if len(cells) != 1:
        raise InputError(
            f"inspect: {len(cells)} cells were named; name one, by its id or folder: `nmsweep inspect CELL limit=20`"
        )
    limit = given.get("limit", "10")
    if not limit.isdigit():
        raise InputError(f"limit: {limit!r} is no number of items; pass limit=20")
    from nmsweep.inspection import show_flips

    show_flips(Path(given.get("results_dir", "results")), cells[0], given.get("task"), int(limit))
    return 0


def _bench(words: Sequence[str]) -> int:
    _silence_libraries()
    from nmsweep.bench.command import bench

    return bench(words)


def _sensitivity(words: Sequence[str]) -> int:
    """`nmsweep sensitivity [skip=K] <key=value …>`: the overrides of one cell."""
    own = [word for word in words if word.startswith("skip=")]
    value = _key_values(own, ["skip"]).get("skip", "0")
    if not value.isdigit():
        raise InputError(f"skip: {value!r} is no number of layers; allowed: 0, 1, 2, …")
    from nmsweep.compose import cells_of

    [cfg] = cells_of([word for word in words if word not in own], multirun=False, config_dir=None)
    if errors := _unwritable(cfg.results_dir):
        raise InputError(*errors)
    _silence_libraries()
    from nmsweep.sensitivity import sensitivity, targets_word
    from nmsweep.session import Session

    session = Session()
    with session.display:
        file, table = sensitivity(cfg, int(value), session)
    for row in table.nlargest(10, "relative_error").itertuples():
        print(f"{row.relative_error:8.4f}  {row.layer}{'  skipped' if row.skip else ''}")
    if int(value):
        print(f"'targets=\"{targets_word(cfg.targets, table)}\"'")
    print(file)
    return 0


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "bench": _bench,
    "report": _report,
    "list": _list,
    "inspect": _inspect,
    "sensitivity": _sensitivity,
}

if __name__ == "__main__":
    main()
