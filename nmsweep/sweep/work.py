"""Cells one after another in one process: a failed cell does not stop the others, and one process computes each cell."""

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nmsweep.cell.run import run
from nmsweep.cell.session import Session
from nmsweep.config.schema import RunConfig
from nmsweep.errors import Busy, NmsweepError, StorageError
from nmsweep.progress import Display
from nmsweep.results.claims import find
from nmsweep.results.layout import CELLS, LOG, PROVENANCE, failure_folder
from nmsweep.results.quarantine import damage
from nmsweep.results.record import failure_of, write_failure
from nmsweep.results.storage import taking
from nmsweep.sweep.machine import share_machine, shares_gpus
from nmsweep.sweep.plan import Batch, Plan, PlannedCell, load

log = logging.getLogger(__name__)

POLL_S = (0.05, 0.5)
"""Seconds between two looks at a cell that another process is computing: at first, and after some."""


def run_batch(batch: Batch, display: Display, plan: Plan | None = None, *, patient: bool = False) -> None:
    """Run a batch of cells; what a job calls, perhaps on another machine.

    Args:
        batch: which cells, of which plan.
        display: where the process shows its cells.
        plan: the plan, if it is at hand; else it is read from the results folder.
        patient: see `work`.

    Raises:
        StorageError: the results folder takes no more.
    """
    with _logging_to(batch):
        plan = plan or load(batch.results_dir, batch.plan_id)
        share_machine(batch.worker, batch.n_workers, with_gpus=shares_gpus(plan))
        session = Session(display, sweep=batch.plan_id, launch=batch.launch_id)
        work(plan, batch.indices, session, patient=patient)


@contextmanager
def _logging_to(batch: Batch) -> Iterator[None]:
    """Write the log of this process to a file while the block lasts: the terminal belongs to the display."""
    with taking(batch.results_dir):
        batch.log_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(batch.log_dir / LOG, delay=True)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    logging.raiseExceptions = False  # where the disk takes no log it takes no record either, and that is reported
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    except Exception:
        log.exception("batch")
        raise
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def work(plan: Plan, indices: Sequence[int], session: Session, *, patient: bool) -> None:
    """Run cells of a plan; come back later to those that another process is computing.

    How each cell ended is in the results folder.

    Args:
        plan: the plan.
        indices: of its cells, in the order they are tried.
        session: what is kept between them.
        patient: wait until every cell is there; otherwise leave cells to other processes that are seen to compute them.

    Raises:
        StorageError: the results folder takes no more; the remaining cells were not tried.
        KeyboardInterrupt: the process was told to stop.
    """
    waiting = [plan.cells[index] for index in indices]
    seen: dict[str, tuple[int, float]] = {}
    announced = False
    pause_s = POLL_S[0]
    while waiting:
        tried = [(cell, attempt(cell, plan.config(cell), session)) for cell in waiting]
        held = [(cell, busy) for cell, busy in tried if busy]
        left = [cell for cell, busy in held if patient or not _is_elsewhere(plan.results_dir, cell, busy.claim, seen)]
        if left and len(left) == len(waiting):
            if patient and not announced:
                session.display.say(f"    waiting for other processes: {held[0][1]}")
                announced = True
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S[1])
        waiting = left


def _is_elsewhere(results_dir: Path, cell: PlannedCell, claim_name: str, seen: dict[str, tuple[int, float]]) -> bool:
    """Return whether another process is seen to compute this cell: it lives on this machine, or has touched its claim since.

    Args:
        results_dir: the results folder.
        cell: the cell.
        claim_name: of the claim that is held by another process.
        seen: when each claim was last touched; updated.
    """
    claim = find(results_dir, claim_name)
    if claim is None or claim.note != cell.name:  # of a state, or of a cell that differs in its tasks only
        return False
    if claim.owner and claim.owner.is_alive():
        return True
    touched = (claim.generation, claim.touched)
    return seen.setdefault(claim_name, touched) != touched


def attempt(cell: PlannedCell, cfg: RunConfig, session: Session) -> Busy | None:
    """Run a cell; record a failure instead of raising it, so that the sweep goes on.

    Returns:
        None if the cell has ended; else which other process holds it, or what it needs.

    Raises:
        StorageError: the results folder takes no more.
    """
    folder = cfg.results_dir / CELLS / cell.name
    if folder.is_dir() and not cfg.force and not damage(folder):  # made by another process since
        return None
    failed = failure_folder(cfg.results_dir, cell.name)
    if failure_of(failed, session.launch) is not None:  # by another process of this launch
        return None
    try:
        run(cfg, session)
    except Busy as busy:
        return busy
    except StorageError:
        raise
    except Exception as error:  # the boundary between cells: any failure of one must leave the others alone
        log.exception("cell failed")
        reason = str(error) if isinstance(error, NmsweepError) else f"{type(error).__name__}: {error}"
        about = {
            "error": reason,
            "traceback": traceback.format_exc(),
            "launch": session.launch,
            "cell_id": cell.cell_id,
        }
        write_failure(failed, cfg.dump(), about)
        session.display.finished(f"FAILED: {reason} (traceback: {failed / PROVENANCE})")
    return None
