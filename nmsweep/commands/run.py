"""A command that runs cells: planned, then handed to Hydra, which calls back for each batch of them."""

import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsweep.errors import InputError, NmsweepError
from nmsweep.results.owner import temporary_name

if TYPE_CHECKING:  # torch comes with them
    from nmsweep.sweep.launching import Launch
    from nmsweep.sweep.plan import Plan
    from nmsweep.sweep.work import Outcome


def planned(words: Sequence[str], overrides: Sequence[str], multirun: bool, config_dir: Path | None) -> "Plan":
    """The plan of a command, with a look at nothing but its words, the models' configs and the data.

    Raises:
        InputError: every mistake of the command, all together.
    """
    from nmsweep.config.compose import cells_of, is_multirun

    multirun = multirun or is_multirun(overrides, config_dir)
    configs = cells_of(overrides, multirun=multirun, config_dir=config_dir)
    silence_libraries()
    from nmsweep.sweep.planning import make_plan

    return make_plan(configs, words, lambda text: print(f"nmsweep: {text.strip()}", file=sys.stderr))


def run_cells(words: list[str], overrides: list[str], multirun: bool, config_dir: Path | None) -> int:
    """Run the cells of a command that are missing; the exit code."""
    if "hydra/launcher=joblib" in overrides and "cluster.workers=1" not in overrides:
        from nmsweep.sweep.processes import get_ready

        silence_libraries()
        get_ready()
    plan = planned(words, overrides, multirun, config_dir)
    if errors := unwritable(plan.results_dir):
        raise InputError(*errors)
    from nmsweep.results.leftovers import remove_abandoned, restore
    from nmsweep.sweep.plan import store
    from nmsweep.sweep.status import missing

    restore(plan.results_dir)
    pending = missing(plan)
    store(plan, latest=bool(pending))
    n_cells, n_missing = len(plan.cells), len(pending)
    if not pending:
        what, them = (f"all {n_cells} cells exist", "them") if n_cells > 1 else ("this cell exists", "it")
        print(f"nmsweep: {what} in {plan.results_dir}; nothing to do (force=true runs {them} again)", file=sys.stderr)
        return 0
    if n_cells > 1:
        print(f"nmsweep: {n_cells} cells, {n_cells - n_missing} exist already, {n_missing} to run", file=sys.stderr)
    remove_abandoned(plan.results_dir)
    return run_plan(words, plan, pending)


def run_plan(words: list[str], plan: "Plan", pending: Sequence[int]) -> int:
    """Run some cells of a plan that is stored, through the launcher that the words name; the exit code."""
    from nmsweep.results.interrupt import interruptible
    from nmsweep.results.leftovers import remove_abandoned
    from nmsweep.sweep.launching import Launch

    with interruptible():
        code = hand_to_hydra(words, Launch(plan, tuple(pending), secrets.token_hex(6)))
        remove_abandoned(plan.results_dir)  # of workers that were killed
        return code


SEEN_GPUS = "NMSWEEP_SEEN_GPUS"
"""Environment variable: CUDA_VISIBLE_DEVICES as the user has it (``all`` for none), for jobs from which a launcher hides it."""


def see_gpus() -> None:
    """Let this process see the GPUs that the command that started it saw; before torch is imported, or CUDA does not look."""
    if (seen := os.environ.pop(SEEN_GPUS, None)) is None:
        return
    if seen == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen


def silence_libraries() -> None:
    """Cells have one display; download bars and chatter of libraries would tear it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def unwritable(results_dir: Path) -> list[str]:
    """Try to write where the results will lie, or in the folder that theirs will be made in; no trace of it is left.

    No folder is made: it could not be taken away again without the risk that another command has begun to use it.
    """
    try:
        there = next(folder for folder in (results_dir, *results_dir.parents) if _is_there(folder))
        with tempfile.NamedTemporaryFile(dir=there, prefix=f"{temporary_name()}_"):
            return []
    except OSError as error:
        why = f"{results_dir} cannot be written ({error.strerror})"
        return [f"results_dir: {why}; pass results_dir=DIR with a folder of yours"]


def _is_there(place: Path) -> bool:
    try:
        place.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def hand_to_hydra(words: list[str], task: "Launch | None" = None) -> int:
    """Start Hydra's application on a command that was checked; the exit code."""
    import hydra

    from nmsweep.config.defaults import conf_dir

    outcomes: list[Outcome] = []
    sys.argv = [sys.argv[0], *words]
    job = _Job(task, outcomes)
    _current.append(job)
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    finally:
        _current.pop()
    if job.error is not None:
        raise job.error
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

    def __init__(self, task: "Launch | None", outcomes: "list[Outcome]") -> None:
        self.task = task
        self.outcomes = outcomes
        self.error: NmsweepError | None = None  # kept from Hydra, which would print a traceback

    def __getstate__(self) -> dict[str, Any]:
        return {"task": None, "outcomes": [], "error": None}

    def __call__(self, cfg: Any) -> None:
        see_gpus()
        silence_libraries()
        from nmsweep.sweep.launching import run_batch

        if self.task is not None and "batch" not in cfg:
            try:
                self.outcomes += self.task.run_here()
            except NmsweepError as error:
                self.error = error
            return
        run_batch(str(cfg.batch), Path(str(cfg.results_dir)), remote=self.task is None)


def sweep_cells(launcher: Any, arguments: Sequence[str], config: Any) -> None:
    """Run the cells of the current command through one of Hydra's launchers; what the sweeper calls."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from nmsweep.config.schema import ClusterConfig
    from nmsweep.sweep.launching import launch

    job = _current[-1]
    assert job.task is not None
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    shared = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    try:
        job.outcomes += launch(launcher, job.task, shared, ClusterConfig(**config.cluster))
    except NmsweepError as error:
        job.error = error
