"""Atomic writes of files and folders, and one message for a results folder that cannot be written."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nmsweep.errors import StorageError
from nmsweep.results.interrupt import uninterrupted
from nmsweep.results.layout import REPLACED
from nmsweep.results.owner import temporary_name

_FULL_OR_GONE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
}


def why_unwritable(results_dir: Path) -> str:
    """Return why `results_dir`, or its nearest existing parent, is not writable; empty if it is.

    No folder is made: removing it again could take it from another command that has begun to use it.
    """
    try:
        existing = next(folder for folder in (results_dir, *results_dir.parents) if _exists(folder))
        with tempfile.NamedTemporaryFile(dir=existing, prefix=f"{temporary_name()}_"):
            return ""
    except OSError as error:
        return f"results_dir: {results_dir} cannot be written ({error.strerror}); pass results_dir=DIR with a folder of yours"


def _exists(place: Path) -> bool:
    try:
        place.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def taking(place: Path) -> Iterator[None]:
    """Turn errors of a folder that cannot be written into a `StorageError`.

    Raises:
        StorageError: the disk is full, the folder read-only, its server gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_OR_GONE:
            raise
        raise StorageError(
            f"results_dir: {place} cannot be written ({os.strerror(error.errno)}); "
            "what was finished before is kept; make room, then give the same command again"
        ) from error


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `place` when the block ends without an error.

    What was at `place` before is replaced. If another process writes it at the same time, one of the two stays, whole. An
    interrupt that arrives in the block is raised when it ends.

    Raises:
        StorageError: the folder cannot be written.
    """
    with uninterrupted(), taking(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.parent / temporary_name()
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                _flush_to_disk(file)
            _take_place(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, place: Path) -> None:
    """Rename a folder; keep what it replaces aside until then, so that `put_back` can restore it after a kill."""
    aside = place.parent / temporary_name(REPLACED)
    try:
        if place.exists():
            aside.mkdir()
            with suppress(FileNotFoundError):  # another process has moved it
                os.rename(place, aside / place.name)
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.exists():  # another process was first; its record is equal
                raise
    finally:
        put_back(aside)


def put_back(aside: Path) -> None:
    """Restore what was being replaced, unless something has taken its place; then remove the folder that kept it.

    Args:
        aside: that folder; its name begins with `REPLACED`.
    """
    for old in [*aside.iterdir()] if aside.is_dir() else []:
        place = aside.parent / old.name
        try:
            os.rename(old, place)
        except OSError:
            if not place.exists():  # the disk is full; the next run tries again
                return
    shutil.rmtree(aside, ignore_errors=True)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def whole_file(place: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; rename it to `place` when the block ends without an error.

    Raises:
        StorageError: the folder cannot be written.
    """
    with uninterrupted(), taking(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(temporary_name())
        try:
            yield temporary
            _flush_to_disk(temporary)  # or a crash may leave the name without the content
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(place: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        StorageError: the folder cannot be written.
    """
    with whole_file(place) as temporary:
        temporary.write_text(text)
