"""Damaged records: detect them, move them aside, never count and never delete them."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nmsweep.results.layout import CELL_FILES, PROVENANCE, QUARANTINE, SAMPLES
from nmsweep.results.record import Part, Parts, file_digest, is_newer


def damage(folder: Path, *, deep: bool = False) -> str:
    """Return what is wrong with a finished cell's files; empty if nothing is, or if a later version wrote the record.

    Every file must have the size that was written (in records older than sizes: must not be empty). Small files must have their
    digest too; samples only if asked for, as those of 5,000 cells are gigabytes.

    Args:
        folder: of the cell.
        deep: compare the digest of the samples as well.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        if is_newer(provenance):
            return ""
        written = provenance.get("files", {})
        for name in CELL_FILES[:-1]:
            size, expected = (folder / name).stat().st_size, written.get(name, {})
            if size != expected.get("bytes", size) or not size:
                return f"{name} has {size} bytes, not {expected.get('bytes', 'some')}"
            if (deep or name != SAMPLES) and expected and file_digest(folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def put_aside(place: Path, results_dir: Path, why: str, say: Callable[[str], None]) -> None:
    """Move something damaged aside, so that it is computed again, and say so; do nothing if another process has just done it.

    Args:
        place: a cell, a part or a file.
        results_dir: the results folder that it is in.
        why: what is wrong with it.
        say: called with its new place.
    """
    aside = results_dir / QUARANTINE / f"{place.name}_{secrets.token_hex(4)}"
    aside.parent.mkdir(exist_ok=True)
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return
    say(f"    {place.relative_to(results_dir)} is damaged ({why}): put aside as {aside}, computed again")


def sound_part(parts: Parts, task: str, identity: Mapping[str, Any], say: Callable[[str], None]) -> Part | None:
    """Read a task's part; None if there is none with this identity. Move a damaged one aside; the cell must be claimed."""
    try:
        return parts.read(task, identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        put_aside(parts.folder / task, parts.results_dir, f"{type(error).__name__}: {error}", say)
        return None


def table_damage(file: Path) -> str:
    """Return why a Parquet file cannot be opened; empty if it can, or does not exist."""
    try:
        pq.read_metadata(file)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
