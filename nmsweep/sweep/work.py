"""Cells one after another in one process: whatever happens to one, the others go on, and each is computed by one process."""

import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nmsweep.cell.run import run
from nmsweep.cell.session import Session
from nmsweep.config.schema import RunConfig
from nmsweep.errors import Busy, NmsweepError, StorageError
from nmsweep.results.claims import find
from nmsweep.results.quarantine import damage
from nmsweep.results.record import failure_folder, failure_of, write_failure
from nmsweep.sweep.plan import Plan, PlannedCell

log = logging.getLogger(__name__)

POLL_S = (0.05, 0.5)
"""Seconds between two looks at a cell that another process is computing: at first, and after some."""

_sessions: list[Session] = []


@dataclass(frozen=True)
class Outcome:
    """How one cell ended.

    Attributes:
        name: of its folder.
        status: ``busy`` where another process had it.
        error: why it failed; for a busy one, who has it.
        claim: the claim that another process has.
    """

    name: str
    status: Literal["done", "failed", "busy"]
    error: str = ""
    claim: str = ""


def session() -> Session:
    """The session of this process, made when it is first asked for."""
    if not _sessions:
        _sessions.append(Session())
    return _sessions[0]


def work(plan: Plan, indices: Sequence[int], *, patient: bool) -> list[Outcome]:
    """Run cells of a plan; what another process is computing is passed over and looked at again later.

    Args:
        plan: the plan.
        indices: which of its cells, in the order they are tried.
        patient: wait until every cell is there; otherwise leave to other processes the cells that they are seen to work at.

    Returns:
        how each cell ended.

    Raises:
        StorageError: nothing more can be kept; the remaining cells were not tried.
        KeyboardInterrupt: the user wants it to stop.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = [plan.cells[index] for index in indices]
    watched: dict[str, tuple[int, float]] = {}
    told = False
    pause_s = POLL_S[0]
    while waiting:
        before = len(waiting)
        for cell in waiting:
            outcomes[cell.name] = attempt(cell, plan.config(cell))
        waiting = [cell for cell in waiting if outcomes[cell.name].status == "busy"]
        if not patient:
            waiting = [
                cell
                for cell in waiting
                if not _is_elsewhere(plan.results_dir, cell, outcomes[cell.name].claim, watched)
            ]
        if waiting and len(waiting) == before:
            if patient and not told:
                session().display.say(f"    waiting for other processes: {outcomes[waiting[0].name].error}")
                told = True
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S[1])
    return list(outcomes.values())


def _is_elsewhere(results_dir: Path, cell: PlannedCell, claim: str, watched: dict[str, tuple[int, float]]) -> bool:
    """Whether another process is seen to work at the cell itself: it runs on this machine, or its claim was touched since."""
    found = find(results_dir, claim)
    if (
        found is None or found.note != cell.name
    ):  # of a state that is being made, or of a cell that differs in its tasks
        return False
    if found.owner and found.owner.is_alive():
        return True
    seen = (found.generation, found.touched)
    return watched.setdefault(claim, seen) != seen


def attempt(cell: PlannedCell, cfg: RunConfig) -> Outcome:
    """Run a cell; record a failure instead of raising it, so that a sweep goes on."""
    here = session()
    made = cfg.results_dir / "cells" / cell.name
    if made.is_dir() and not cfg.force and not damage(made):  # by another process since
        return Outcome(cell.name, "done")
    place = failure_folder(cfg.results_dir, cell.name)
    if (error := failure_of(place, here.launch)) is not None:  # by another process of this launch
        return Outcome(cell.name, "failed", error)
    try:
        run(cfg, here)
        return Outcome(cell.name, "done")
    except Busy as busy:
        return Outcome(cell.name, "busy", str(busy), busy.claim)
    except StorageError:
        raise
    except Exception as error:  # the boundary between cells: any failure of one must leave the others alone
        log.exception("cell failed")
        reason = str(error) if isinstance(error, NmsweepError) else f"{type(error).__name__}: {error}"
        about = {"error": reason, "traceback": traceback.format_exc(), "launch": here.launch, "cell_id": cell.cell_id}
        write_failure(place, cfg.dump(), about)
        here.display.finished(f"FAILED: {reason} (traceback: {place / 'provenance.json'})")
        return Outcome(cell.name, "failed", reason)
