"""Leftovers of interrupted runs in a results folder: find them, and remove them when their process is gone.

Nothing outside the folder is touched: where a link stands in the place of one of its folders, its target is left alone.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nmsweep.results.claims import all_claims, looks_stale
from nmsweep.results.layout import CLAIMS, PARTS, QUARANTINE, REPLACED, RUNS, UNFINISHED, WRITTEN
from nmsweep.results.owner import STALE_S, is_abandoned, server_clock
from nmsweep.results.storage import put_back

RUNS_KEPT_S = 7 * 24 * 3600.0
"""Age in seconds up to which the folders of runs are kept for their logs."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go, and what it is."""

    path: Path
    what: str

    @property
    def n_bytes(self) -> int:
        """Its size, with everything in it."""
        files = self.path.rglob("*") if self.path.is_dir() and not self.path.is_symlink() else [self.path]
        return sum(_size(file) for file in files)


def _size(file: Path) -> int:
    try:
        return 0 if file.is_dir() else file.lstat().st_size
    except OSError:  # removed by another process
        return 0


def _entries(folder: Path) -> list[Path]:
    """List a folder, sorted; return nothing where there is none, or a link in its place."""
    if folder.is_symlink():
        return []
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def abandoned(results_dir: Path) -> list[Path]:
    """Return the files and folders that a process was writing or replacing when it ended."""
    entries = [*results_dir.iterdir()] if results_dir.is_dir() else []  # the results folder itself may be a link
    for folder in (*(results_dir / name for name in WRITTEN), *_entries(results_dir / PARTS)):
        entries += _entries(folder)
    now = server_clock(results_dir)
    return [path for path in entries if path.name.startswith((UNFINISHED, REPLACED)) and is_abandoned(path, now)]


def restore(results_dir: Path) -> None:
    """Restore the records that a process was replacing when it was killed."""
    for path in abandoned(results_dir):
        if path.name.startswith(REPLACED):
            remove(path)


def remove_abandoned(results_dir: Path) -> int:
    """Remove the temporary files and claims whose process is gone; return their number.

    Removing a claim gives it to nobody: whoever makes one checks afterwards whether there is another.
    """
    claims = [] if (results_dir / CLAIMS).is_symlink() else all_claims(results_dir)
    paths = [*abandoned(results_dir), *(claim.place for claim in claims if claim.is_orphan)]
    for path in paths:
        remove(path)
    return len(paths)


def leftovers(results_dir: Path) -> list[Leftover]:
    """Return everything that `nmsweep gc` may remove: nothing that a living process or a later run needs."""
    if not results_dir.is_dir():
        return []
    now = server_clock(results_dir)
    entries = [Leftover(path, "unfinished, its process is gone") for path in abandoned(results_dir)]
    if not (results_dir / CLAIMS).is_symlink():
        stale = [claim for claim in all_claims(results_dir) if looks_stale(claim, now(), STALE_S)]
        entries += [Leftover(claim.place, "claim of a process that is gone") for claim in stale]
    entries += [Leftover(path, "damaged, put aside") for path in _entries(results_dir / QUARANTINE)]
    for run in _entries(results_dir / RUNS):
        if now() - run.lstat().st_mtime > RUNS_KEPT_S:
            entries.append(Leftover(run, "logs of a run, older than a week"))
    return entries


def remove(path: Path) -> None:
    """Remove a file or folder, or put back what was being replaced."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.name.startswith(REPLACED):
        put_back(path)
    else:
        shutil.rmtree(path, ignore_errors=True)
