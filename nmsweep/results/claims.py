"""Who computes what: a lease on a name, held by one process of all that share a results folder.

A claim is a file ``<name>.<generation>`` under ``.claims/``. It is written beside its place and linked there, which one
process alone can do, so that it never lies there half-written. Its holder touches it while it works. A claim is void when its
process is known to be gone, or when the process that wants it has itself seen it untouched for the length of the lease, by a
clock that only runs forward: no clock of another node is read, nor are the times of files, which some file systems (Lustre)
take from the node that writes. A void claim is taken over by making the next generation, which again one process alone can
do; nothing is removed on the way, so there is no moment at which two may believe that they have it. Locks of the file system
(flock, lockf) play no part.

Should a stopped process go on after its claim was taken over, the same cell is computed twice and, records being renamed
whole into their place, one of two equal records stays.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from nmsweep.errors import Busy
from nmsweep.results.owner import Owner, me, parse_owner, temporary_name
from nmsweep.results.storage import taking

LEASE_S = 120.0
"""Seconds without a sign of life after which a claim is void; attribute caches of network file systems hold up to 60."""

BEAT_S = 15.0
"""Seconds between two signs of life."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A claim as its file says it.

    Attributes:
        name: what is claimed.
        generation: how often it was taken over.
        place: its file.
        owner: who has it; None where the file does not say.
        note: what it is, for people.
        touched: when its holder last gave a sign of life, in seconds by whatever clock the file system uses.
    """

    name: str
    generation: int
    place: Path
    owner: Owner | None
    note: str
    touched: float

    @property
    def is_orphan(self) -> bool:
        """Whether its process is known to be gone."""
        return self.owner is not None and self.owner.is_alive() is False


@dataclass
class _Heart:
    """Touches the claims of this process from a thread of its own, which lives while there are any."""

    places: set[Path] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def add(self, place: Path) -> None:
        with self._lock:
            if not self.places:
                self._stop = threading.Event()
                threading.Thread(target=self._beat, args=(self._stop,), daemon=True, name="claims").start()
            self.places.add(place)

    def remove(self, place: Path) -> None:
        with self._lock:
            self.places.discard(place)
            if not self.places:
                self._stop.set()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            with self._lock:
                places = list(self.places)
            for place in places:
                try:
                    os.utime(place)
                except OSError as error:
                    log.warning("claim %s cannot be kept: %s", place.name, error)


_heart = _Heart()


def claims_folder(results_dir: Path) -> Path:
    return results_dir / ".claims"


@contextlib.contextmanager
def claimed(results_dir: Path, name: str, note: str = "") -> Iterator[None]:
    """Hold a claim for as long as the block lasts.

    What the claim protects may have been finished by its last holder just before: look again inside the block.

    Args:
        results_dir: the results folder that the processes share.
        name: what is claimed; letters, digits, ``-`` and ``_``.
        note: what it is, for `nmsweep status`.

    Raises:
        Busy: another process holds it.
        StorageError: the folder cannot be written.
    """
    with taking(results_dir):
        place = take(results_dir, name, note)
    if place is None:
        found = find(results_dir, name)
        by = found.owner.shown if found and found.owner else "another process"
        raise Busy(f"{note or name}: {by} is computing it", name)
    _heart.add(place)
    try:
        yield
    finally:
        _heart.remove(place)
        _release(results_dir, place)


def take(results_dir: Path, name: str, note: str = "") -> Path | None:
    """Make a claim's file; None if another process holds the claim."""
    folder = claims_folder(results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    known = find(results_dir, name)
    if known is not None and not is_void(known):
        return None
    generation = 0 if known is None else known.generation + 1
    place = folder / f"{name}.{generation}"
    if not _make(place, json.dumps({"owner": str(me()), "note": note})):
        return None
    for other in _all(results_dir, name):  # a process that looked before this file was there may have made another
        if other.generation > generation or (other.generation < generation and not is_void(other)):
            place.unlink(missing_ok=True)
            return None
    return place


def _make(place: Path, text: str) -> bool:
    """Make a file that was not there, whole from its first moment; whether it was this process that made it."""
    temporary = place.with_name(temporary_name())
    try:
        temporary.write_text(text)
        os.link(temporary, place)
        return True
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # NFS repeats a request whose answer was lost, and finds what it made
    except OSError:  # no hard links here (FAT, some FUSE), or no room: then this says so
        return _make_exclusively(place, text)
    finally:
        temporary.unlink(missing_ok=True)


def _make_exclusively(place: Path, text: str) -> bool:
    """The same where there are no hard links: killed between the two steps, it leaves a claim that ends with its lease."""
    try:
        handle = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    return True


def find(results_dir: Path, name: str) -> Claim | None:
    """The claim in force on a name, void or not: the one of the highest generation."""
    return max(_all(results_dir, name), key=lambda claim: claim.generation, default=None)


def all_claims(results_dir: Path) -> list[Claim]:
    """Every claim in a results folder."""
    return [claim for place in _files(results_dir) if (claim := _read(place))]


_seen: dict[Path, tuple[float, float]] = {}
"""Of each claim that this process looked at: the touch that it saw last, and since when (seconds, monotonic)."""


def is_void(claim: Claim) -> bool:
    """Whether a claim's process is gone, or has not touched it for the length of the lease while this process looked on."""
    if claim.is_orphan:
        return True
    touched, since = _seen.setdefault(claim.place, (claim.touched, monotonic()))
    if touched != claim.touched:
        _seen[claim.place] = (claim.touched, monotonic())
        return False
    return monotonic() - since > LEASE_S


def looks_void(claim: Claim, now: float, silent_s: float = LEASE_S) -> bool:
    """Whether a claim seems to be nobody's, at one look; for what people are shown, not for taking it over.

    Args:
        claim: a claim.
        now: the file server's time in seconds.
        silent_s: seconds without a touch that are taken for a sign.
    """
    return claim.is_orphan or now - claim.touched > silent_s


def _release(results_dir: Path, place: Path) -> None:
    """Take a claim's files away, the oldest first: what is left of it always says who has it."""
    name, _, own = place.name.rpartition(".")
    older = [p for p in _files(results_dir, name) if _generation(p) < int(own)]
    for file in (*sorted(older, key=_generation), place):
        with contextlib.suppress(OSError):  # a folder that is gone or read-only by now: the lease ends by itself
            file.unlink(missing_ok=True)


def _generation(place: Path) -> int:
    return int(place.name.rpartition(".")[2])


def _files(results_dir: Path, name: str = "") -> list[Path]:
    try:
        return [p for p in claims_folder(results_dir).iterdir() if not p.name.startswith(".") and _is_of(p, name)]
    except FileNotFoundError:
        return []


def _is_of(place: Path, name: str) -> bool:
    own, _, generation = place.name.rpartition(".")
    return generation.isdecimal() and (not name or own == name)


def _all(results_dir: Path, name: str) -> list[Claim]:
    return [claim for place in _files(results_dir, name) if (claim := _read(place))]


def _read(place: Path) -> Claim | None:
    """A claim; None if it was released meanwhile. The file is opened: network file systems ask the server only then."""
    try:
        with place.open(errors="replace") as file:
            text, touched = file.read(4096), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    name, _, generation = place.name.rpartition(".")
    return Claim(name, int(generation), place, parse_owner(text), _note(text), touched)


def _note(text: str) -> str:
    try:
        stored = json.loads(text)
    except ValueError:
        return ""
    return str(stored.get("note", "")) if isinstance(stored, dict) else ""
