"""How far a sweep is: compare its stored plan with the results folder. Nothing is composed, nothing is written."""

import time
from collections.abc import Mapping
from pathlib import Path

from nmsweep.results.claims import all_claims, looks_stale
from nmsweep.results.layout import CLAIMS, failure_folder
from nmsweep.results.owner import server_clock
from nmsweep.results.quarantine import damage
from nmsweep.results.record import cell_index, failure_of
from nmsweep.sweep.estimate import duration, measured
from nmsweep.sweep.plan import Plan, PlannedCell


def missing(plan: Plan) -> list[int]:
    """Return the indices of the cells to compute: those without a record, with a damaged one, or forced."""
    known = cell_index(plan.results_dir)
    return [
        at
        for at, cell in enumerate(plan.cells)
        if cell.config.get("force") or (folder := known.get(cell.cell_id)) is None or damage(folder)
    ]


def show_status(plan: Plan, limit: int = 20) -> int:
    """Print how far a plan is, with the first `limit` lines of each list; return the number of failed cells."""
    known, holders = cell_index(plan.results_dir), _holders(plan)
    lines: dict[str, list[str]] = {state: [] for state in ("done", "running", "failed", "missing", "damaged")}
    unfinished = []
    for cell in plan.cells:
        state, about = _state(cell, plan.results_dir, known, holders)
        lines[state].append(f"{state:8} {cell.name}{about}")
        unfinished += [cell] if state != "done" else []
    print(f"plan {plan.plan_id}: nmsweep {' '.join(plan.words)}")
    counts = [f"{len(cells)} {state}" for state, cells in lines.items() if cells or state != "damaged"]
    print(f"{len(plan.cells)} cells: {', '.join(counts)}")
    if unfinished:
        throughput = measured(known.values())
        expected = [throughput.seconds(cell) for cell in unfinished]
        seconds = sum(filter(None, expected)) / max(1, len(set(holders.values())))
        left = "unknown: no cell with these tasks and models is finished"
        print(f"time left: {left if None in expected else 'about ' + duration(seconds)}")
    for state in ("running", "failed", "damaged", "missing"):
        for line in lines[state][:limit]:
            print(f"  {line}")
        if len(lines[state]) > limit:
            print(f"  … and {len(lines[state]) - limit} more; limit=N shows more")
    if lines["failed"]:
        print("`nmsweep retry`, or the sweep's own command, runs all that is not done")
    return len(lines["failed"])


def _state(
    cell: PlannedCell, results_dir: Path, known: Mapping[str, Path], holders: Mapping[str, str]
) -> tuple[str, str]:
    """Return a cell's state, and what to say of it: who computes it, or why it failed."""
    if cell.cell_id in known:
        return ("damaged" if damage(known[cell.cell_id]) else "done"), ""
    if cell.name in holders:
        return "running", f"  ({holders[cell.name]})"
    error = failure_of(failure_folder(results_dir, cell.name))
    return ("missing", "") if error is None else ("failed", f": {error}")


def _holders(plan: Plan) -> dict[str, str]:
    """Return the living process that computes each running cell, by the cell's name."""
    now = server_clock(plan.results_dir / CLAIMS, otherwise=time.time())  # the folder may be read-only
    held = [claim for claim in all_claims(plan.results_dir) if not looks_stale(claim, now())]
    return {claim.note: claim.owner.shown if claim.owner else "a process" for claim in held}
