"""The folder where converted models and file digests are kept, and how it is written without half-made entries."""

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
"""Age in seconds after which another process's unfinished work is taken for abandoned."""


def cache_dir() -> Path:
    """``$NMSWEEP_CACHE``, else ``~/.cache/nmsweep``."""
    return Path(os.environ.get("NMSWEEP_CACHE") or "~/.cache/nmsweep").expanduser()


def built_once(final: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder if it is not there; it exists whole or not at all.

    Any number of processes may ask at once: each works in a folder of its own, the first to finish gives it its name,
    the others use that one.

    Args:
        final: where the finished folder lies.
        make: fills the empty folder that it is given.

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
            make(work)
            work.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
            _give_name(work, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cache {cache_dir()}: {error.strerror or error} ({error.filename or final.name}); "
            "a folder with room for the model is needed; set NMSWEEP_CACHE=DIR"
        ) from error
    return final


def _give_name(work: Path, final: Path) -> None:
    try:
        work.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was first
            raise


def _remove_abandoned(final: Path) -> None:
    """Remove what a killed process left behind."""
    for folder in final.parent.glob(f".{final.name}.*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str | None:
    """The digest kept for this path, if the file still has the size and modification time that it had then."""
    try:
        kept = json.loads(_digest_file(path).read_text())
    except (OSError, ValueError):
        return None
    return str(kept["sha256"]) if kept.get("stamp") == _stamp(path) else None


def kept_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, kept so that a large file is read once."""
    if known := known_sha256(path):
        return known
    stamp = _stamp(path)
    digest = sha256_file(path)
    kept = _digest_file(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=kept.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({"path": str(path.resolve()), "stamp": stamp, "sha256": digest}, file)
        os.replace(temporary, kept)
    except OSError:
        pass  # a cache that cannot be written costs time at the next start, nothing else
    return digest


def _digest_file(path: Path) -> Path:
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_dir() / "digests" / f"{key[:24]}.json"


def _stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
