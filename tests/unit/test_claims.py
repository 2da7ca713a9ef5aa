"""Claims: one holder, whatever happens to it, whatever the clocks say."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nmsweep.errors import Busy, StorageError
from nmsweep.results import claims
from nmsweep.results.claims import LEASE_S, all_claims, claimed, find, is_void, take
from nmsweep.results.leftovers import leftovers, remove_abandoned
from nmsweep.results.owner import STALE_S, Owner, me, parse_owner, server_time, temporary_name

ELSEWHERE = Owner("othernode", "0" * 8, 4242, 17)


def claim_of(results: Path, owner: Owner, age_s: float = 0.0, generation: int = 0) -> Path:
    """A claim as another process leaves it."""
    place = results / ".claims" / f"cell.{generation}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"owner": str(owner), "note": "a cell"}))
    then = server_time(place.parent) - age_s
    os.utime(place, (then, then))
    return place


def watch(results: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Look at every claim, and let so much time pass."""
    for claim in all_claims(results):
        is_void(claim)
    now = claims.monotonic() + seconds
    monkeypatch.setattr(claims, "monotonic", lambda: now)


def dead_process() -> Owner:
    """A process of this machine that has ended."""
    code = "from nmsweep.results.owner import me; print(me())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    owner = parse_owner(said)
    assert owner is not None
    return owner


def test_a_claim_has_one_holder_and_is_free_again_after(tmp_path: Path) -> None:
    with claimed(tmp_path, "cell", "a cell"):
        with pytest.raises(Busy, match=f"cell: process {os.getpid()} on"), claimed(tmp_path, "cell"):
            pass
        with claimed(tmp_path, "another"):
            pass
    assert not list((tmp_path / ".claims").iterdir())
    with claimed(tmp_path, "cell"):
        pass


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(20):
        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(lambda _, name=f"cell{attempt}": take(tmp_path, name), range(16)))
        assert sum(place is not None for place in got) == 1


def test_of_many_that_take_over_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for generation in range(20):
        for file in (tmp_path / ".claims").glob("*"):
            file.unlink()
        claim_of(tmp_path, ELSEWHERE, generation=generation)
        watch(tmp_path, monkeypatch, LEASE_S + 5)
        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(lambda _: take(tmp_path, "cell"), range(16)))
        assert sum(place is not None for place in got) == 1


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    claim_of(tmp_path, dead_process())
    with claimed(tmp_path, "cell"):
        assert (found := find(tmp_path, "cell")) is not None
        assert (found.generation, found.owner) == (1, me())
    assert not list((tmp_path / ".claims").iterdir())


def test_a_reused_process_number_is_not_taken_for_the_old_process(tmp_path: Path) -> None:
    here = me()
    claim_of(tmp_path, Owner(here.host, here.machine, here.pid, here.started - 1))
    assert take(tmp_path, "cell") is not None


@pytest.mark.parametrize("owner", [ELSEWHERE, me()], ids=["another machine", "a stopped process"])
def test_a_claim_is_held_until_it_was_seen_untouched_for_the_length_of_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Owner
) -> None:
    place = claim_of(tmp_path, owner, age_s=1e6)  # by a clock that is behind
    watch(tmp_path, monkeypatch, LEASE_S - 5)
    assert take(tmp_path, "cell") is None
    os.utime(place)
    watch(tmp_path, monkeypatch, LEASE_S - 5)
    assert take(tmp_path, "cell") is None
    watch(tmp_path, monkeypatch, LEASE_S + 5)
    assert take(tmp_path, "cell") is not None


@pytest.mark.parametrize("skew_s", [-86400.0, 86400.0])
def test_the_clocks_of_nodes_are_never_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float) -> None:
    now = time.time
    claim_of(tmp_path, ELSEWHERE)
    unfinished = tmp_path / f".tmp_{ELSEWHERE}_abcdef01"
    unfinished.mkdir()
    monkeypatch.setattr(time, "time", lambda: now() + 1.1 * skew_s)
    assert (found := find(tmp_path, "cell")) is not None
    assert not is_void(found)
    assert take(tmp_path, "cell") is None
    assert remove_abandoned(tmp_path) == 0
    assert unfinished.exists()
    assert not leftovers(tmp_path)


def test_what_another_machine_left_goes_when_it_is_a_day_old(tmp_path: Path) -> None:
    old, then = tmp_path / f".tmp_{ELSEWHERE}_abcdef01", time.time() - 1.1 * STALE_S
    old.mkdir()
    os.utime(old, (then, then))
    claim = claim_of(tmp_path, ELSEWHERE, 1.1 * STALE_S)
    assert {leftover.path for leftover in leftovers(tmp_path)} == {old, claim}
    assert remove_abandoned(tmp_path) == 1
    assert not old.exists()


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    with claimed(tmp_path, "cell"):
        first = find(tmp_path, "cell")
        assert first is not None
        for _ in range(200):
            time.sleep(0.02)
            if (later := find(tmp_path, "cell")) and later.touched > first.touched:
                return
    pytest.fail("never touched")


def test_a_hostile_or_torn_claim_ends_with_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (b"", b"{", b'["owner"]', b"x" * 10_000, b'{"owner": "../..~zz~1~1"}', b"\xff\x00"):
        claim_of(tmp_path, ELSEWHERE, generation=10**15).write_bytes(text)
        watch(tmp_path, monkeypatch, LEASE_S + 5)
        with claimed(tmp_path, "cell"):
            pass
        assert not list((tmp_path / ".claims").iterdir())


def no_links(*args: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_a_claim_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda *args: Full().write(""))
        full.setattr(os, "fdopen", lambda handle, mode: os.close(handle) or Full())
        with pytest.raises(StorageError, match="No space left"), claimed(tmp_path, "cell"):
            pass
    assert not list((tmp_path / ".claims").iterdir())
    with claimed(tmp_path, "cell"):
        assert len(all_claims(tmp_path)) == 1


def test_a_claim_is_whole_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    link = os.link

    def look(source: Path, place: Path) -> None:
        link(source, place)
        made.append(place.read_text())

    monkeypatch.setattr(os, "link", look)
    with claimed(tmp_path, "cell", "a cell"):
        assert json.loads(made[0]) == {"owner": str(me()), "note": "a cell"}


def test_without_hard_links_one_process_alone_makes_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda _: take(tmp_path, "cell"), range(16)))
    assert sum(place is not None for place in got) == 1
    assert [claim.owner for claim in all_claims(tmp_path)] == [me()]
    assert len(list((tmp_path / ".claims").iterdir())) == 1


def test_a_process_that_cannot_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under hidepid a process of another user is not in /proc, and takes no signal."""

    def hidden(file: Path) -> str:
        raise FileNotFoundError(file)

    def of_another_user(pid: int, number: int) -> None:
        raise PermissionError

    here = me()
    gone = dead_process()
    monkeypatch.setattr(Path, "read_text", hidden)
    assert gone.is_alive() is False
    monkeypatch.setattr(os, "kill", of_another_user)
    assert Owner(here.host, here.machine, 4242, 17).is_alive() is True


def test_temporary_names_say_whose_they_are_and_fit_a_folder() -> None:
    assert parse_owner(temporary_name()) == me()
    assert len(temporary_name()) < 100


def test_what_a_killed_process_held_is_cleared_and_what_others_hold_stays(tmp_path: Path) -> None:
    dead = claim_of(tmp_path, dead_process())
    with claimed(tmp_path, "mine"):
        assert remove_abandoned(tmp_path) == 1
        assert not dead.exists()
        elsewhere = claim_of(tmp_path, ELSEWHERE, age_s=2 * LEASE_S)  # its node alone knows whether it lives
        assert remove_abandoned(tmp_path) == 0
        assert sorted(place.name for place in elsewhere.parent.iterdir()) == ["cell.0", "mine.0"]
