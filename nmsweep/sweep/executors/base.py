"""The base of executors: give missing cells to jobs, watch the results folder, read the outcomes from it.

A job runs a `Batch` of cells (`nmsweep.sweep.work.run_batch`), perhaps on another machine. It returns nothing: what counts
are the records in the results folder. Modules of this package import no torch before a batch runs, so that a job can still
choose which GPUs it sees.
"""

import inspect
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar

from nmsweep.config.schema import ClusterConfig
from nmsweep.errors import InputError, NmsweepError, nearest
from nmsweep.progress import Display
from nmsweep.results.claims import Claim, all_claims, is_void
from nmsweep.results.layout import failure_folder
from nmsweep.results.record import cell_index, failure_of
from nmsweep.sweep.plan import Batch, Plan, PlannedCell

log = logging.getLogger(__name__)

CELLS_PER_JOB = 8
"""Cells of one model in a job of Slurm or Ray where `cluster.cells_per_job` is not given: they share the model's loading."""

POLL_S = 2.0
"""Seconds between two looks at cells that another sweep is computing."""


@dataclass(frozen=True)
class Launch:
    """The work of one command.

    Attributes:
        plan: all its cells.
        pending: indices of those to compute.
        launch_id: kept in their records, by which the processes of one launch know each other's.
        log_dir: folder for logs.
        cluster: how cells are shared out.
    """

    plan: Plan
    pending: tuple[int, ...]
    launch_id: str
    log_dir: Path
    cluster: ClusterConfig

    @property
    def cells(self) -> list[PlannedCell]:
        """The cells to compute."""
        return [self.plan.cells[index] for index in self.pending]

    def batches(self, shares: Sequence[Sequence[int]], *, one_machine: bool = False) -> list[Batch]:
        """Return a batch for each share of the pending cells; `one_machine` if their processes share cores and GPUs."""
        n = len(shares)
        return [
            Batch(
                results_dir=self.plan.results_dir,
                plan_id=self.plan.plan_id,
                launch_id=self.launch_id,
                indices=tuple(share),
                log_dir=self.log_dir / str(number) if n > 1 else self.log_dir,
                worker=number if one_machine else 0,
                n_workers=n if one_machine else 1,
            )
            for number, share in enumerate(shares)
        ]


class Executor(ABC):
    """Runs the pending cells of a launch. Its constructor takes the keys of its file in ``conf/hydra/launcher``."""

    first_is_here: ClassVar[bool] = False
    """Whether the first batch runs in this process, which then shows the cells of all."""

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Check that jobs can be started, before anything is written.

        Raises:
            InputError: a package is missing, or a key of the launcher is not accepted.
        """

    @abstractmethod
    def share(self, launch: Launch) -> list[Batch]:
        """Share the pending cells out among jobs."""

    @abstractmethod
    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> Mapping[int, str]:
        """Run batches and wait for their end.

        Returns:
            why a cell's job was lost, by the cell's index in the plan.

        Raises:
            NmsweepError: the jobs cannot be started, or the results folder takes no more.
        """

    def execute(self, launch: Launch) -> dict[str, str]:
        """Run the pending cells of a launch.

        Returns:
            why cells failed, by their names.

        Raises:
            NmsweepError: the jobs cannot be started, or the results folder takes no more.
        """
        display = Display(len(launch.pending))
        batches = self.share(launch)
        elsewhere = len(batches) > 1 or not self.first_is_here
        if elsewhere:
            n_jobs = f"{len(batches)} jobs" if len(batches) > 1 else "one job"
            display.say(f"    {len(launch.pending)} cells in {n_jobs}")
        lost: Mapping[int, str] = {}
        failure = ""
        with display, _showing_others(launch, display) if elsewhere else nullcontext():
            try:
                lost = self.run(batches, launch.plan, display)
            except NmsweepError:
                raise
            except Exception as error:  # libraries raise their own kinds; the records say what was done
                log.exception("executor")
                failure = f"{type(error).__name__}: {error}"
            else:
                _wait_for_other_sweeps(launch, display)
        ended = _ended(launch)
        errors: dict[str, str] = {}
        for index, cell in zip(launch.pending, launch.cells, strict=True):
            why, reason = ended.get(cell.name), lost.get(index, failure)
            if why is None or (reason and cell.config.get("force")):
                of_another = failure_of(failure_folder(launch.plan.results_dir, cell.name))  # that held its claim
                why = why or reason or of_another or _NO_RECORD
            if why:
                errors[cell.name] = why
        return errors


def executor_of(node: Mapping[str, Any]) -> Executor:
    """Return the executor that a composed `hydra.launcher` names.

    Raises:
        InputError: its ``_target_`` is no executor, or it has a key that the executor does not take.
    """
    target = str(node.get("_target_"))
    module, _, name = target.rpartition(".")
    try:
        executor = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"hydra.launcher: _target_ {target} cannot be imported ({error})") from error
    if not (inspect.isclass(executor) and issubclass(executor, Executor)):
        raise InputError(
            f"hydra.launcher: _target_ is {target}, no executor of nmsweep; "
            "allowed: hydra/launcher=basic|joblib|submitit_slurm|submitit_local|ray, and files with `defaults: [one of these, _self_]`"
        )
    keys = {key: value for key, value in node.items() if key != "_target_"}
    parameters = inspect.signature(executor).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown := [key for key in keys if key not in parameters and not takes_any]:
        allowed = nearest(unknown[0], parameters) if parameters else "it has no keys"
        raise InputError(f"hydra.launcher.{unknown[0]}: is no key of {executor.__name__}; {allowed}")
    return executor(**keys)


def rotated(pending: Sequence[int], n_workers: int) -> list[list[int]]:
    """Give every worker all cells, each beginning elsewhere: claims decide who computes what, and none is idle early."""
    starts = [len(pending) * worker // n_workers for worker in range(n_workers)]
    return [[*pending[start:], *pending[:start]] for start in starts]


def by_model(launch: Launch) -> list[list[int]]:
    """Share cells out so that each job has one model and at most `cluster.cells_per_job` cells; equally long per model."""
    size = launch.cluster.cells_per_job or CELLS_PER_JOB
    shares = []
    for _, same in groupby(launch.pending, lambda index: launch.plan.cells[index].model_key):
        cells = list(same)
        n_shares = -(-len(cells) // size)
        bounds = [len(cells) * at // n_shares for at in range(n_shares + 1)]
        shares += [cells[start:stop] for start, stop in pairwise(bounds)]
    return shares


_NO_RECORD = "no record of it is there; give the command again to compute it"


def _ended(launch: Launch) -> dict[str, str]:
    """Return the cells of a launch that have ended, by name: why they failed in it, or nothing if they have a record."""
    results_dir = launch.plan.results_dir
    records = cell_index(results_dir)
    ended = {}
    for cell in launch.cells:
        error = failure_of(failure_folder(results_dir, cell.name), launch.launch_id)
        if error is not None or cell.cell_id in records:
            ended[cell.name] = error or ""
    return ended


def _wait_for_other_sweeps(launch: Launch, display: Display) -> None:
    """Wait for cells that our jobs left to processes of another sweep, as long as those live."""
    announced = False
    while held := _held(launch):
        if not announced:
            name, claim = next(iter(held.items()))
            holder = claim.owner.shown if claim.owner else "another process"
            display.say(f"    waiting for {len(held)} cells of another sweep: {holder} is computing {name}")
            announced = True
        time.sleep(POLL_S)


def _held(launch: Launch) -> dict[str, Claim]:
    """Return the claims on cells of a launch that have not ended, by the cells' names."""
    ended = _ended(launch)
    claims = {claim.note: claim for claim in all_claims(launch.plan.results_dir) if not is_void(claim)}
    return {cell.name: claims[cell.name] for cell in launch.cells if cell.name in claims and cell.name not in ended}


@contextmanager
def _showing_others(launch: Launch, display: Display) -> Iterator[None]:
    """Show cells as other processes finish them, while the block lasts."""
    stop = threading.Event()

    def look() -> None:
        for name, error in _ended(launch).items():
            display.elsewhere(name, f"FAILED: {error}" if error else "done by another process")

    def watch() -> None:
        while not stop.wait(1):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
