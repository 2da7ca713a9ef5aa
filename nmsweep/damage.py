"""Records that are not what was written: found out, put aside, never counted and never thrown away."""

import json
import os
import secrets
from pathlib import Path

from nmsweep.record import CELL_FILES, file_digest


def damage(folder: Path, *, deep: bool = False) -> str:
    """What is wrong with a finished cell's files; empty for nothing.

    Every file has to be there with the size that was written (records before there were sizes: not empty).

    Args:
        folder: of the cell.
        deep: also compare the files' digests.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
        written = provenance.get("files", {})
        for name in CELL_FILES[:-1]:
            size, expected = (folder / name).stat().st_size, written.get(name, {})
            if size != expected.get("bytes", size) or not size:
                return f"{name} has {size} bytes, not {expected.get('bytes', 'some')}"
            if deep and expected and file_digest(folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def quarantine(folder: Path, results_dir: Path) -> Path:
    """Put a damaged cell aside, so that it is computed anew; nothing of it is thrown away."""
    aside = results_dir / "quarantine"
    aside.mkdir(exist_ok=True)
    place = aside / f"{folder.name}_{secrets.token_hex(4)}"
    os.rename(folder, place)
    return place
