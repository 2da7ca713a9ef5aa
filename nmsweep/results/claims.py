"""Leases: of all processes that share a results folder, one holds the claim on a name.

A claim is a file ``<name>.<generation>`` in ``.claims/``. It is written under a temporary name and linked to its place, which
only one process can do and which never shows half a file. Its holder touches it while it works. A claim is void when its process
is known to be gone, or when the process that wants it has itself seen it untouched for the length of the lease, by its own
monotonic clock. Clocks of other nodes are not read, nor are file times, which some file systems (Lustre) take from the writing
node. A void claim is taken over by making the next generation, which again only one process can do. Nothing is removed on
the way, so two processes never both hold it. No file locks (flock, lockf) are used.

If a stopped process resumes after its claim was taken over, a cell is computed twice. Records are renamed into place whole, so
one of two equal records stays.
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
from nmsweep.results.layout import CLAIMS
from nmsweep.results.owner import Owner, me, parse_owner, temporary_name
from nmsweep.results.storage import taking

LEASE_S = 120.0
"""Seconds without a touch after which a claim is void; network file systems may cache times for 60."""

BEAT_S = 15.0
"""Seconds between two touches."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A claim, as read from its file.

    Attributes:
        name: what is claimed.
        generation: how often it was taken over.
        place: its file.
        owner: the process that holds it; None where the file does not say.
        note: what is claimed, for people.
        touched: when its holder last touched it, in seconds by the file system's clock.
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
    """A thread that touches the claims of this process; it runs while there are any."""

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


@contextlib.contextmanager
def claimed(results_dir: Path, name: str, note: str = "") -> Iterator[None]:
    """Hold a claim while the block lasts.

    Its last holder may have just finished what it protects: look again inside the block.

    Args:
        results_dir: the shared results folder.
        name: what is claimed; letters, digits, ``-`` and ``_``.
        note: the same for people, shown by `nmsweep status`.

    Raises:
        Busy: another process holds it.
        StorageError: the folder cannot be written.
    """
    with taking(results_dir):
        place = take(results_dir, name, note)
    if place is None:
        claim = find(results_dir, name)
        holder = claim.owner.shown if claim and claim.owner else "another process"
        raise Busy(f"{note or name}: {holder} is computing it", name)
    _heart.add(place)
    try:
        yield
    finally:
        _heart.remove(place)
        _release(results_dir, place)


def take(results_dir: Path, name: str, note: str = "") -> Path | None:
    """Make a claim's file; return None if another process holds the claim."""
    folder = results_dir / CLAIMS
    folder.mkdir(parents=True, exist_ok=True)
    known = find(results_dir, name)
    if known is not None and not is_void(known):
        return None
    generation = 0 if known is None else known.generation + 1
    place = folder / f"{name}.{generation}"
    if not _make(place, json.dumps({"owner": str(me()), "note": note})):
        return None
    for other in all_claims(results_dir, name):  # a process that looked before this file existed may have made another
        if other.generation > generation or (other.generation < generation and not is_void(other)):
            place.unlink(missing_ok=True)
            return None
    return place


def _make(place: Path, text: str) -> bool:
    """Create a file with its content in one step; return whether this process created it."""
    temporary = place.with_name(temporary_name())
    try:
        temporary.write_text(text)
        os.link(temporary, place)
        return True
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # NFS repeats a request whose answer was lost, and meets its own file
    except OSError:  # no hard links (FAT, some FUSE); or a full disk, which then raises here
        return _make_exclusively(place, text)
    finally:
        temporary.unlink(missing_ok=True)


def _make_exclusively(place: Path, text: str) -> bool:
    """Do the same without hard links; a kill between its two steps leaves a claim that ends with its lease."""
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
    """Return the claim with the highest generation on a name, void or not."""
    return max(all_claims(results_dir, name), key=lambda claim: claim.generation, default=None)


def all_claims(results_dir: Path, name: str = "") -> list[Claim]:
    """Return every claim in a results folder, or those on one name."""
    try:
        places = [place for place in (results_dir / CLAIMS).iterdir() if place.suffix[1:].isdecimal()]
    except FileNotFoundError:
        return []
    return [claim for place in places if name in ("", place.stem) and (claim := _read(place))]


_seen: dict[Path, tuple[float, float]] = {}
"""By claim file: the last touch that this process saw, and when it first saw it (seconds, monotonic)."""


def is_void(claim: Claim) -> bool:
    """Return whether a claim's process is gone, or did not touch it for the length of the lease while this process watched."""
    if claim.is_orphan:
        return True
    touched, since = _seen.setdefault(claim.place, (claim.touched, monotonic()))
    if touched != claim.touched:
        _seen[claim.place] = (claim.touched, monotonic())
        return False
    return monotonic() - since > LEASE_S


def looks_stale(claim: Claim, now: float, silent_s: float = LEASE_S) -> bool:
    """Return whether a claim looks stale; for display and for `gc`, not for taking it over.

    Args:
        claim: a claim.
        now: the file server's time in seconds.
        silent_s: seconds without a touch from which on it looks stale.
    """
    return claim.is_orphan or now - claim.touched > silent_s


def _release(results_dir: Path, place: Path) -> None:
    """Remove a claim's files, the oldest first, so that what is left always names its holder."""
    claims = sorted(all_claims(results_dir, place.stem), key=lambda claim: claim.generation)
    for file in (*(claim.place for claim in claims if claim.generation < int(place.suffix[1:])), place):
        with contextlib.suppress(OSError):  # the folder is gone or read-only by now: the lease expires
            file.unlink(missing_ok=True)


def _read(place: Path) -> Claim | None:
    """Read a claim; None if it was released. The file is opened, as network file systems ask the server only then."""
    try:
        with place.open(errors="replace") as file:
            text, touched = file.read(4096), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    note = ""
    with contextlib.suppress(ValueError, AttributeError):  # a kill may leave it empty where there are no hard links
        note = str(json.loads(text).get("note", ""))
    return Claim(place.stem, int(place.suffix[1:]), place, parse_owner(text), note, touched)
