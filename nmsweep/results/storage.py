"""Files and folders that exist whole or not at all, and the message of a disk that takes no more."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nmsweep.errors import StorageError
from nmsweep.results.interrupt import uninterrupted
from nmsweep.results.owner import REPLACED, temporary_name

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


@contextmanager
def taking(place: Path) -> Iterator[None]:
    """Tell a results folder that takes no more from other errors.

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
    """Fill a temporary folder beside `place`; it takes `place` in one rename when the block ends without an error.

    What was at `place` before is replaced. If another process fills it at the same time, one of the two stays whole. An
    interrupt that comes in the block is held back until it ends.

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
    with _moved_aside(place):
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.exists():  # somebody else was first: theirs is as good as ours
                raise


@contextmanager
def _moved_aside(place: Path) -> Iterator[None]:
    """Keep what is at a place beside it until the block has put something there; killed in between, `put_back` finds it."""
    if not place.exists():
        yield
        return
    aside = place.parent / temporary_name(REPLACED)
    aside.mkdir()
    try:
        with suppress(FileNotFoundError):  # another process has moved it
            os.rename(place, aside / place.name)
        yield
    finally:
        put_back(aside)


def put_back(aside: Path) -> None:
    """Give what was being replaced its place again where nothing took it, then remove the folder that kept it.

    Args:
        aside: that folder; its name begins with ``.old_``.
    """
    for old in [*aside.iterdir()] if aside.is_dir() else []:
        place = aside.parent / old.name
        try:
            os.rename(old, place)
        except OSError:
            if not place.exists():  # the disk takes nothing now; the next run tries again
                return
    shutil.rmtree(aside, ignore_errors=True)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def whole_file(place: Path) -> Iterator[Path]:
    """Write a temporary file beside `place`; it takes `place` when the block ends without an error.

    Raises:
        StorageError: the folder cannot be written.
    """
    with uninterrupted(), taking(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(temporary_name())
        try:
            yield temporary
            _flush_to_disk(temporary)  # or a crash of the machine may leave the name without the content
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(place: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        StorageError: the folder cannot be written.
    """
    with whole_file(place) as temporary:
        temporary.write_text(text)
