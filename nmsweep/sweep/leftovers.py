"""What an interrupted run leaves in a results folder: found, named, removed when its process is gone."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nmsweep.disk.claims import all_claims, claims_folder, is_void
from nmsweep.disk.owner import is_abandoned, server_time
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
        files = [self.path] if self.path.is_file() else [p for p in self.path.rglob("*") if p.is_file()]
        return sum(_size(file) for file in files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def temporary_files(results_dir: Path) -> Iterator[Path]:
    """Every unfinished file or folder, whoever makes it."""
    places = [results_dir, *(results_dir / name for name in ("cells", "failed", "items", "report", ".calibration"))]
    parts = results_dir / ".parts"
    places += [
        plans_folder(results_dir),
        claims_folder(results_dir),
        parts,
        *(parts.iterdir() if parts.is_dir() else ()),
    ]
    for place in places:
        try:
            yield from [Path(entry.path) for entry in os.scandir(place) if entry.name.startswith(".tmp_")]
        except (FileNotFoundError, NotADirectoryError):
            continue


def remove_abandoned(results_dir: Path) -> int:
    """Remove the temporary files and claims whose process is known to be gone; how many there were.

    Nobody gets a claim by that: who makes one looks again afterwards whether another is there.
    """
    found = [path for path in temporary_files(results_dir) if is_abandoned(path)]
    found += [
        claim.place
        for claim, _ in all_claims(results_dir)
        if claim.owner is not None and claim.owner.is_alive() is False
    ]
    for path in found:
        _remove(path)
    return len(found)


def leftovers(results_dir: Path) -> list[Leftover]:
    """Everything that `nmsweep gc` may remove; nothing that a living process or a later run has a use for."""
    if not results_dir.is_dir():
        return []
    now = server_time(results_dir)
    found = [
        Leftover(path, "unfinished, its process is gone")
        for path in temporary_files(results_dir)
        if is_abandoned(path, now)
    ]
    found += [
        Leftover(claim.place, "claim of a process that is gone")
        for claim, _ in all_claims(results_dir)
        if is_void(claim)
    ]
    for name, what in (("quarantine", "damaged record, computed again since or to be"),):
        folder = results_dir / name
        found += [Leftover(path, what) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    runs = results_dir / ".runs"
    for run in sorted(runs.iterdir()) if runs.is_dir() else ():
        if now - run.stat().st_mtime > RUNS_KEPT_S:
            found.append(Leftover(run, "Hydra's folder of a run, older than a week"))
    return found


def remove(found: list[Leftover]) -> None:
    """Remove what `leftovers` found."""
    for leftover in found:
        _remove(leftover.path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
