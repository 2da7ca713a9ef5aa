"""What an interrupted run leaves in a results folder: found, named, removed when its process is gone.

Nothing outside the folder is touched: where a link stands in the place of one of its folders, what that leads to is left alone.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nmsweep.results.claims import all_claims, claims_folder, looks_void
from nmsweep.results.owner import REPLACED, STALE_S, UNFINISHED, is_abandoned, server_clock
from nmsweep.results.storage import put_back
from nmsweep.sweep.plan import plans_folder

RUNS_KEPT_S = 7 * 24 * 3600.0
"""Age in seconds up to which Hydra's own folders are kept for their logs."""


@dataclass(frozen=True)
class Leftover:
    """Something that can go: where it is, what it is."""

    path: Path
    what: str

    @property
    def n_bytes(self) -> int:
        """Its size, folders with all that is in them; what vanishes meanwhile counts nothing."""
        files = self.path.rglob("*") if self.path.is_dir() and not self.path.is_symlink() else [self.path]
        return sum(_size(file) for file in files)


def _size(file: Path) -> int:
    try:
        return 0 if file.is_dir() else file.lstat().st_size
    except OSError:
        return 0


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing where there is none or a link in its place."""
    if folder.is_symlink():
        return []
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def temporary_files(results_dir: Path) -> Iterator[Path]:
    """Every file or folder that is being written or replaced, whoever does it."""
    names = ("cells", "failed", "items", "recipes", "report", ".calibration")
    parts = results_dir / ".parts"
    places = [*(results_dir / name for name in names), plans_folder(results_dir), claims_folder(results_dir), parts]
    found = [*results_dir.iterdir()] if results_dir.is_dir() else []  # it may be a link itself
    for place in [*places, *_entries(parts)]:
        found += _entries(place)
    yield from (path for path in found if path.name.startswith((UNFINISHED, REPLACED)))


def abandoned(results_dir: Path) -> list[Path]:
    """The temporary files whose process is gone."""
    now = server_clock(results_dir)
    return [path for path in temporary_files(results_dir) if is_abandoned(path, now)]


def restore(results_dir: Path) -> None:
    """Put back the records that a process was replacing when it was killed."""
    for path in abandoned(results_dir):
        if path.name.startswith(REPLACED):
            _remove(path)


def remove_abandoned(results_dir: Path) -> int:
    """Remove the temporary files and claims whose process is known to be gone; how many there were.

    Nobody gets a claim by that: who makes one looks again afterwards whether another is there.
    """
    orphans = [] if claims_folder(results_dir).is_symlink() else [c for c in all_claims(results_dir) if c.is_orphan]
    found = [*abandoned(results_dir), *(claim.place for claim in orphans)]
    for path in found:
        _remove(path)
    return len(found)


def leftovers(results_dir: Path) -> list[Leftover]:
    """Everything that `nmsweep gc` may remove; nothing that a living process or a later run has a use for."""
    if not results_dir.is_dir():
        return []
    now = server_clock(results_dir)
    found = [Leftover(path, "unfinished, its process is gone") for path in abandoned(results_dir)]
    if not claims_folder(results_dir).is_symlink():
        void = [claim for claim in all_claims(results_dir) if looks_void(claim, now(), STALE_S)]
        found += [Leftover(claim.place, "claim of a process that is gone") for claim in void]
    aside = _entries(results_dir / "quarantine")
    found += [Leftover(path, "damaged, computed again since or to be") for path in aside]
    for run in _entries(results_dir / ".runs"):
        if now() - run.lstat().st_mtime > RUNS_KEPT_S:
            found.append(Leftover(run, "Hydra's folder of a run, older than a week"))
    return found


def remove(found: list[Leftover]) -> None:
    """Remove what `leftovers` found."""
    for leftover in found:
        _remove(leftover.path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.name.startswith(REPLACED):
        put_back(path)
    else:
        shutil.rmtree(path, ignore_errors=True)
