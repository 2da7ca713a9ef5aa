"""The cache of converted models and file digests, safe for any number of processes at once."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nmsweep.errors import ModelError

_STALE_S = 24 * 3600.0
"""Age in seconds after which an unfinished folder counts as abandoned."""


def cache_dir() -> Path:
    """Return ``$NMSWEEP_CACHE``, else ``~/.cache/nmsweep``."""
    return Path(os.environ.get("NMSWEEP_CACHE") or "~/.cache/nmsweep").expanduser()


def built_once(final: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder unless it exists; it is there complete or not at all.

    Each process works in a temporary folder of its own. The first to finish renames it; the others use the result.

    Args:
        final: path of the finished folder.
        build: fills the empty folder that it is given.

    Raises:
        ModelError: the cache cannot be written.
    """
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            build(work)
            work.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
            if not final.is_dir():
                work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if final.is_dir():  # another process was first
            return final
        raise ModelError(
            f"cache {cache_dir()}: {error.strerror or error} ({error.filename or final.name}); "
            "a folder with room for the model is needed; set NMSWEEP_CACHE=DIR"
        ) from error
    return final


def _remove_abandoned(final: Path) -> None:
    """Remove what killed processes left behind."""
    for folder in final.parent.glob(f".{final.name}.*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str | None:
    """Return the cached digest of a file, if its size and modification time are unchanged; else None."""
    try:
        entry = json.loads(_digest_file(path).read_text())
    except (OSError, ValueError):
        return None
    return str(entry["sha256"]) if entry.get("stamp") == _stamp(path) else None


def kept_sha256(path: Path) -> str:
    """Return the hex sha256 of a file; it is cached, so that a large file is read once."""
    if known := known_sha256(path):
        return known
    entry = {"path": str(path.resolve()), "stamp": _stamp(path), "sha256": sha256_file(path)}
    target = _digest_file(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        os.replace(temporary, target)
    except OSError:
        pass  # without a cache the file is read again next time
    return str(entry["sha256"])


def _digest_file(path: Path) -> Path:
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_dir() / "digests" / f"{key[:24]}.json"


def _stamp(path: Path) -> list[int]:
    """Return the size in bytes and the modification time in ns of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
