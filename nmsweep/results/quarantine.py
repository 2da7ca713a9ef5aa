"""Records that are not what was written: found out, put aside, never counted and never thrown away."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nmsweep.results.record import CELL_FILES, Part, Parts, file_digest, is_newer

LARGE = "samples.parquet"
"""The file of a record whose digest is not compared each time that the record is counted."""


def damage(folder: Path, *, deep: bool = False) -> str:
    """What is wrong with a finished cell's files; empty for nothing, or for a record of a version that this one cannot judge.

    Every file has to be there with the size that was written (records before there were sizes: not empty), and the small
    ones with their digest: a sweep looks at all its cells, and of 5,000 their samples alone are gigabytes.

    Args:
        folder: of the cell.
        deep: compare the digest of the samples too.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
        if is_newer(provenance):
            return ""
        written = provenance.get("files", {})
        for name in CELL_FILES[:-1]:
            size, expected = (folder / name).stat().st_size, written.get(name, {})
            if size != expected.get("bytes", size) or not size:
                return f"{name} has {size} bytes, not {expected.get('bytes', 'some')}"
            if (deep or name != LARGE) and expected and file_digest(folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def quarantine(place: Path, results_dir: Path) -> Path:
    """Put a damaged cell, part or file aside, so that it is made anew; nothing of it is thrown away."""
    aside = results_dir / "quarantine" / f"{place.name}_{secrets.token_hex(4)}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(place, aside)
    return aside


def put_aside(place: Path, results_dir: Path, why: str, say: Callable[[str], None]) -> None:
    """Put something damaged aside and say so; another process may have done it just before.

    Args:
        place: a cell, a part or a file.
        results_dir: the results folder that it is in.
        why: what is wrong with it.
        say: told where it is now.
    """
    try:
        aside = quarantine(place, results_dir)
    except FileNotFoundError:
        return
    say(f"    {place.relative_to(results_dir)} is damaged ({why}): put aside as {aside}, computed again")


def sound_part(parts: Parts, task: str, identity: Mapping[str, Any], say: Callable[[str], None]) -> Part | None:
    """A task's part, or None if there is none of this identity; a damaged one is put aside. The cell has to be claimed."""
    try:
        return parts.read(task, identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        put_aside(parts.folder / task, parts.results_dir, f"{type(error).__name__}: {error}", say)
        return None


def table_damage(file: Path) -> str:
    """What keeps a Parquet file, if it is there, from being opened; empty for nothing."""
    try:
        pq.read_metadata(file)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
