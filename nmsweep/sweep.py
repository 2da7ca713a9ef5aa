"""Many cells: what a process keeps between them, and what happens when one fails."""

import logging
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from nmsweep.cell import identify
from nmsweep.config import RunConfig, short_hash
from nmsweep.errors import NmsweepError
from nmsweep.record import cell_folder, write_failure
from nmsweep.run import run
from nmsweep.session import Session

log = logging.getLogger(__name__)

_sessions: list[Session] = []


@dataclass(frozen=True)
class Outcome:
    """How one cell ended: its folder's name, and why it failed."""

    name: str
    status: Literal["done", "failed"]
    error: str = ""


def session() -> Session:
    """The session of this process, made when it is first asked for."""
    if not _sessions:
        _sessions.append(Session())
    return _sessions[0]


def attempt(cfg: RunConfig) -> Outcome:
    """Run a cell; record a failure instead of raising it, so that a sweep goes on.

    KeyboardInterrupt passes: the user wants the sweep to stop.
    """
    here = session()
    try:
        return Outcome(run(cfg, here).folder.name, "done")
    except Exception as error:  # the boundary between cells: any failure of one must leave the others alone
        log.exception("cell failed")
        reason = str(error) if isinstance(error, NmsweepError) else f"{type(error).__name__}: {error}"
        place = write_failure(_folder(cfg), cfg.dump(), {"error": reason, "traceback": traceback.format_exc()})
        here.display.finished(f"FAILED: {reason} (traceback: {place / 'provenance.json'})")
        return Outcome(place.name, "failed", reason)


def _folder(cfg: RunConfig) -> Any:
    """The cell's place; where even its identity cannot be had, one that only its config decides."""
    try:
        return identify(cfg).folder
    except NmsweepError:
        criterion = cfg.criterion.name if cfg.criterion else "none"
        return cell_folder(
            cfg.results_dir, cfg.model_name, cfg.pattern.slug, criterion, cfg.mitigation, short_hash(cfg.dump())
        )


def launch(launcher: Any, jobs: list[list[str]]) -> list[Outcome]:
    """Give every cell of a sweep to Hydra's launcher.

    Args:
        launcher: a Hydra launcher.
        jobs: the overrides of each cell.

    Raises:
        SystemExit: code 1 after the last cell, if any failed; each is named.
    """
    display = session().display
    display.expect(len(jobs))
    with display:
        returned = launcher.launch(jobs, initial_job_idx=0)
    outcomes = [_outcome(job) for job in returned]
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        display.say(f"FAILED {outcome.name}: {outcome.error}")
    if failed:
        raise SystemExit(1)
    return outcomes


def _outcome(job: Any) -> Outcome:
    """What a launcher brought back for a job; one that it lost has failed."""
    value = job._return_value
    if isinstance(value, Outcome):
        return value
    return Outcome(" ".join(job.overrides or ()), "failed", f"{type(value).__name__}: {value}")
