"""A plan's cells given to the jobs of a Hydra launcher, and what became of them, read off the results folder.

One job runs many cells: it is told a plan and indices (`Batch`), not a config. On one machine every worker is given all cells,
each beginning elsewhere, and claims decide who computes what, so that no worker is idle while another has a queue. A Slurm
job is given its own share, cells of one model.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsweep.config.schema import ClusterConfig
from nmsweep.errors import InputError, NmsweepError
from nmsweep.progress import Display
from nmsweep.results.claims import Claim, all_claims, is_void
from nmsweep.results.record import cell_index, failure_folder, failure_of
from nmsweep.sweep.plan import Plan, PlannedCell, indices_text, load, parse_indices
from nmsweep.sweep.work import Outcome, session, work
from nmsweep.sweep.workers import grouped, n_local_workers, share_machine, shares_out_gpus

log = logging.getLogger(__name__)

SLURM_CELLS_PER_JOB = 8
"""Cells that share a model's loading where `cluster.cells_per_job` is not given."""

POLL_S = 2.0
"""Seconds between two looks at cells that another sweep is computing."""

_WORD = re.compile(
    r"(?P<plan>[0-9a-f]{20}):(?P<launch>[0-9a-f]{12}):(?P<cells>[0-9_-]+):(?P<worker>\d+):(?P<workers>\d+)"
)


@dataclass(frozen=True)
class Batch:
    """What one job is to do, as one word of its overrides.

    Attributes:
        plan_id: the plan, a file of the results folder.
        launch: which launch this is.
        indices: of the plan's cells.
        worker, n_workers: which of several processes on one machine this is; 0 of 1 where it has the machine to itself.
    """

    plan_id: str
    launch: str
    indices: tuple[int, ...]
    worker: int = 0
    n_workers: int = 1

    def __str__(self) -> str:
        return f"{self.plan_id}:{self.launch}:{indices_text(self.indices)}:{self.worker}:{self.n_workers}"

    @classmethod
    def parse(cls, word: str) -> "Batch":
        found = _WORD.fullmatch(word)
        if found is None:
            raise InputError(f"batch: {word!r} is not for the command line; it is how a sweep talks to its own jobs")
        cells = tuple(parse_indices(found["cells"]))
        return cls(found["plan"], found["launch"], cells, int(found["worker"]), int(found["workers"]))


@dataclass(frozen=True)
class Launch:
    """One command's work.

    Attributes:
        plan: all its cells.
        pending: indices of those that have to be computed.
        launch: id of this launch.
    """

    plan: Plan
    pending: tuple[int, ...]
    launch: str

    def run_here(self, n_workers: int = 1) -> list[Outcome]:
        """Run the pending cells in this process, which is the first of `n_workers` that work at them.

        Raises:
            StorageError: nothing more can be kept.
        """
        here = session()
        here.launch, here.sweep = self.launch, self.plan.plan_id
        here.display.expect(len(self.pending))
        with here.display, _watching(self, here.display) if n_workers > 1 else nullcontext():
            return work(self.plan, self.pending, patient=True)


def run_batch(word: str, results_dir: Path, *, remote: bool) -> list[Outcome]:
    """Run one job's cells; what a launcher calls, perhaps on another machine.

    Args:
        word: the job's `Batch`.
        results_dir: where its plan lies.
        remote: not in the process that the user started: the terminal is not ours, and other jobs are there for other cells.
    """
    batch = Batch.parse(word)
    plan = load(results_dir, batch.plan_id)
    share_machine(batch.worker, batch.n_workers, with_gpus=shares_out_gpus(plan))
    if not remote:
        return Launch(plan, batch.indices, batch.launch).run_here(batch.n_workers)
    here = session()
    here.launch, here.sweep = batch.launch, batch.plan_id
    if "SLURM_JOB_ID" not in os.environ:  # Slurm has a log for each job; other workers share the terminal
        here.display = Display(stream=open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lasts
    here.display.expect(len(batch.indices))
    return work(plan, batch.indices, patient=False)


def batches(launcher: Any, task: Launch, cluster: ClusterConfig) -> list[Batch]:
    """Which cells each job of a launcher is given."""
    kind = type(launcher).__name__
    pending = list(task.pending)
    shares = [pending]
    n_workers = 1
    if kind in ("JoblibJobs", "LocalJobs"):
        n_workers = min(cluster.workers or n_local_workers(task.plan, pending), len(pending))
        starts = [len(pending) * worker // n_workers for worker in range(n_workers)]
        shares = [pending[start:] + pending[:start] for start in starts]
    elif kind != "BasicLauncher":
        shares = grouped(task.plan, pending, cluster.cells_per_job or SLURM_CELLS_PER_JOB)
    return [
        Batch(task.plan.plan_id, task.launch, tuple(share), worker if n_workers > 1 else 0, n_workers)
        for worker, share in enumerate(shares)
    ]


def launch(launcher: Any, task: Launch, words: Sequence[str], cluster: ClusterConfig) -> list[Outcome]:
    """Give a launch to Hydra's launcher and wait for it; what counts in the end is what lies in the results folder.

    Args:
        launcher: of Hydra, set up.
        task: what is to be done.
        words: overrides that all cells share; they decide where Hydra puts its own files.
        cluster: how cells are shared out.

    Returns:
        how each pending cell ended.

    Raises:
        NmsweepError: a job could not start, or nothing more can be kept.
    """
    jobs = batches(launcher, task, cluster)
    display = session().display
    kind = type(launcher).__name__
    remote = kind not in ("BasicLauncher", "JoblibJobs")  # else the first job runs here, and shows the cells of all
    display.expect(len(task.pending))
    if kind != "BasicLauncher":
        cells = f"{len(task.pending)} cells"
        display.say(f"    {cells} in {len(jobs)} jobs" if len(jobs) > 1 else f"    {cells} in one job")
    lost = ""
    with display if remote else nullcontext(), _watching(task, display) if remote else nullcontext():
        try:
            returned = launcher.launch([[*words, f"+batch={job}"] for job in jobs], initial_job_idx=0)
            values: list[Any] = [job._return_value for job in returned]
        except NmsweepError:
            raise
        except Exception as error:  # a launcher raises its libraries' own kinds; the records say what was done
            log.exception("launcher")
            values, lost = [], f"{type(error).__name__}: {error}"
        if not lost:
            _wait_for_others(task, display)
    reasons = {}
    for job, value in zip(jobs, values, strict=False):
        if isinstance(value, NmsweepError) and not remote:
            raise value
        if isinstance(value, BaseException):
            if remote:
                reasons.update(dict.fromkeys(job.indices, f"{value}"))
            else:
                display.say(f"    {value}")
    known = cell_index(task.plan.results_dir)
    return [_outcome(task, task.plan.cells[index], known, reasons.get(index, lost)) for index in task.pending]


def _outcome(task: Launch, cell: PlannedCell, known: Mapping[str, Path], lost: str) -> Outcome:
    """How a cell ended, by its records."""
    if (error := failure_of(failure_folder(task.plan.results_dir, cell.name), task.launch)) is not None:
        return Outcome(cell.name, "failed", error)
    if cell.cell_id in known and not (lost and cell.config.get("force")):
        return Outcome(cell.name, "done")
    elsewhere = failure_of(failure_folder(task.plan.results_dir, cell.name))  # of another sweep that had its claim
    why = lost or elsewhere or "no record of it is there; give the command again to compute it"
    return Outcome(cell.name, "failed", why)


def _wait_for_others(task: Launch, display: Display) -> None:
    """Wait for the cells that our jobs left to processes of another sweep, for as long as those are seen to live."""
    told = False
    while held := _held(task):
        if not told:
            name, claim = next(iter(held.items()))
            who = claim.owner.shown if claim.owner else "another process"
            display.say(f"    waiting for {len(held)} cells of another sweep: {who} is computing {name}")
            told = True
        time.sleep(POLL_S)


def _held(task: Launch) -> dict[str, Claim]:
    """The cells of a launch without a record or a failure of its own that a process has claimed, by name."""
    results_dir, known = task.plan.results_dir, cell_index(task.plan.results_dir)
    claims = {claim.note: claim for claim in all_claims(results_dir) if not is_void(claim)}
    cells = [task.plan.cells[index] for index in task.pending]
    return {
        cell.name: claims[cell.name]
        for cell in cells
        if cell.name in claims
        and cell.cell_id not in known
        and failure_of(failure_folder(results_dir, cell.name), task.launch) is None
    }


@contextmanager
def _watching(task: Launch, display: Display) -> Iterator[None]:
    """Show cells as other processes finish them, for as long as the block lasts."""
    stop = threading.Event()
    waiting = {task.plan.cells[index].cell_id: task.plan.cells[index].name for index in task.pending}

    def look() -> None:
        for cell_id in waiting.keys() & cell_index(task.plan.results_dir).keys():
            display.elsewhere(waiting.pop(cell_id), "done by another process")
        for cell_id, name in list(waiting.items()):
            if (error := failure_of(failure_folder(task.plan.results_dir, name), task.launch)) is not None:
                display.elsewhere(waiting.pop(cell_id), f"FAILED: {error}")

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
