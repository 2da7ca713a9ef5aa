"""How far a sweep is: compare its stored plan with the results folder. Nothing is composed, nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nmsweep.results.claims import all_claims, looks_stale
from nmsweep.results.layout import CLAIMS, failure_folder
from nmsweep.results.owner import server_clock
from nmsweep.results.quarantine import damage
from nmsweep.results.record import cell_index, failure_of
from nmsweep.sweep.estimate import duration, measured
from nmsweep.sweep.plan import Plan, PlannedCell


@dataclass(frozen=True)
class Status:
    """The cells of a plan by their state.

    Attributes:
        done: cells with a record.
        damaged: cells with a damaged record; they are computed again.
        running: cells claimed by a living process, with its name.
        failed: cells with the reason of their failure.
        missing: all others.
        seconds_left: expected seconds for all that is not done, with as many processes as run now, at least one; None if unknown.
    """

    done: Sequence[PlannedCell]
    damaged: Sequence[PlannedCell]
    running: Sequence[tuple[PlannedCell, str]]
    failed: Sequence[tuple[PlannedCell, str]]
    missing: Sequence[PlannedCell]
    seconds_left: float | None


def read_status(plan: Plan) -> Status:
    """Read the state of every cell of a plan."""
    known = cell_index(plan.results_dir)
    done = [cell for cell in plan.cells if cell.cell_id in known]
    damaged = [cell for cell in done if damage(known[cell.cell_id])]
    open_cells = [cell for cell in plan.cells if cell.cell_id not in known]
    holders = _holders(plan)
    running = [(cell, holders[cell.name]) for cell in open_cells if cell.name in holders]
    rest = [cell for cell in open_cells if cell.name not in holders]
    reasons = {cell.cell_id: failure_of(failure_folder(plan.results_dir, cell.name)) for cell in rest}
    failed = [(cell, reason) for cell in rest if (reason := reasons[cell.cell_id]) is not None]
    missing = [cell for cell in rest if reasons[cell.cell_id] is None]
    throughput = measured(known.values())
    expected = [throughput.seconds(cell) for cell in [*open_cells, *damaged]]
    left = None if None in expected else sum(filter(None, expected)) / max(1, len(set(holders.values())))
    whole = [cell for cell in done if cell not in damaged]
    return Status(whole, damaged, running, failed, missing, left)


def missing(plan: Plan) -> list[int]:
    """Return the indices of the cells to compute: those without a record, with a damaged one, or forced."""
    known = cell_index(plan.results_dir)
    return [
        at
        for at, cell in enumerate(plan.cells)
        if cell.config.get("force") or (folder := known.get(cell.cell_id)) is None or damage(folder)
    ]


def _holders(plan: Plan) -> dict[str, str]:
    """Return the process that computes each running cell, by the cell's name."""
    now = server_clock(plan.results_dir / CLAIMS, otherwise=time.time())  # the folder may be read-only
    held = [claim for claim in all_claims(plan.results_dir) if not looks_stale(claim, now())]
    return {claim.note: claim.owner.shown if claim.owner else "a process" for claim in held}


def show_status(plan: Plan, limit: int = 20) -> Status:
    """Print how far a plan is, with the first `limit` lines of each list."""
    status = read_status(plan)
    n_cells = len(plan.cells)
    print(f"plan {plan.plan_id}: nmsweep {' '.join(plan.words)}")
    counts = [f"{len(status.done)} done", f"{len(status.running)} running", f"{len(status.failed)} failed"]
    counts += [f"{len(status.missing)} missing"] + ([f"{len(status.damaged)} damaged"] if status.damaged else [])
    print(f"{n_cells} cells: {', '.join(counts)}")
    if len(status.done) < n_cells:
        left = "unknown: no cell with these tasks and models is finished"
        print(f"time left: {left if status.seconds_left is None else 'about ' + duration(status.seconds_left)}")
    _lines([f"running  {cell.name}  ({holder})" for cell, holder in status.running], limit)
    _lines([f"failed   {cell.name}: {error}" for cell, error in status.failed], limit)
    _lines([f"damaged  {cell.name}" for cell in status.damaged], limit)
    _lines([f"missing  {cell.name}" for cell in status.missing], limit)
    if status.failed:
        print("`nmsweep retry`, or the sweep's own command, runs all that is not done")
    return status


def _lines(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {line}")
    if len(lines) > limit:
        print(f"  … and {len(lines) - limit} more; limit=N shows more")
