"""The process that owns a temporary file or a claim, and whether it still runs.

A process is identified by its machine (host name, boot and process namespace), its number and its start time, so that neither
a reused number nor another container on the same host is mistaken for it.
"""

import contextlib
import hashlib
import os
import re
import socket
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nmsweep.results.layout import UNFINISHED

STALE_S = 24 * 3600.0
"""Age in seconds after which the temporary file of a process on another machine counts as abandoned."""

_TAG = re.compile(r"(?P<host>[A-Za-z0-9-]{0,32})~(?P<machine>[0-9a-f]{8})~(?P<pid>\d+)~(?P<started>\d+)")


@dataclass(frozen=True)
class Owner:
    """One process: its host, for people; a hash that identifies its machine; its number; its start in kernel ticks."""

    host: str
    machine: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.host}~{self.machine}~{self.pid}~{self.started}"

    @property
    def shown(self) -> str:
        """The process, for people."""
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Return whether the process runs; None if it is on another machine, which cannot be asked."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        return started in (_UNKNOWN, self.started)


def me() -> Owner:
    """Return this process."""
    return _owner(os.getpid())


@cache
def _owner(pid: int) -> Owner:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]
    return Owner(host, _machine(), pid, _started(pid) or _UNKNOWN)


@cache
def _machine() -> str:
    """Return a hash of the host, its boot and the process namespace: equal for processes that see each other's numbers."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: only the host's name is known
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


_UNKNOWN = 0


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; `_UNKNOWN` where /proc does not say; None if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):  # gone, of another user under hidepid, or there is no /proc
        return _UNKNOWN if _runs(pid) else None
    return None if state in "ZX" else int(fields[18])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def parse_owner(text: str) -> Owner | None:
    """Return the first owner that a text names; None if it names none."""
    tag = _TAG.search(text)
    return tag and Owner(tag["host"], tag["machine"], int(tag["pid"]), int(tag["started"]))


def temporary_name(prefix: str = UNFINISHED) -> str:
    """Return a new name for an unfinished file or folder of this process, or for what it replaces."""
    return f"{prefix}{me()}_{uuid.uuid4().hex[:8]}"


def is_abandoned(path: Path, now: Callable[[], float]) -> bool:
    """Return whether a temporary file's process is gone, judged by its age where it was on another machine.

    Args:
        path: named by `temporary_name`.
        now: returns the file server's time in seconds; called only where age decides.
    """
    owner = parse_owner(path.name)
    if owner is not None and (alive := owner.is_alive()) is not None:
        return not alive
    try:
        return now() - path.lstat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def server_clock(folder: Path, otherwise: float = float("-inf")) -> Callable[[], float]:
    """Return a function that returns `server_time`, measured once, when it is first called.

    Args:
        folder: on the server.
        otherwise: the time to return where the folder cannot be written; by default nothing is old at it.
    """

    @cache
    def now() -> float:
        try:
            return server_time(folder)
        except OSError:
            return otherwise

    return now


def server_time(folder: Path) -> float:
    """Return the time in seconds by the clock that dates the files of `folder`: that of its file server.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{temporary_name()}_") as probe:
        probe.write(b"?")
        probe.flush()
        os.fsync(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime
