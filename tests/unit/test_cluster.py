"""Hydra's launchers for clusters, without one: what is cancelled when, and which folders they make."""

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

from hydra_plugins.nmsweep_cluster import LocalJobs, SlurmJobs, _private
from nmsweep.errors import InputError
from nmsweep.results.interrupt import Terminated


class Interrupted:
    """A job whose submitter is told to stop while it waits for it."""

    job_id = "17_0"

    def __init__(self, by: type[KeyboardInterrupt]) -> None:
        self.by = by
        self.cancelled = False
        self.paths = SimpleNamespace(result_pickle=SimpleNamespace(exists=self._stop))

    def _stop(self) -> bool:
        raise self.by

    def cancel(self, check: bool) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    ("launcher", "by", "cancelled"),
    [
        (SlurmJobs, KeyboardInterrupt, True),
        (SlurmJobs, Terminated, False),
        (LocalJobs, KeyboardInterrupt, True),
        (LocalJobs, Terminated, True),
    ],
)
def test_a_sigterm_leaves_the_jobs_of_a_cluster_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launcher: Any,
    by: type[KeyboardInterrupt],
    cancelled: bool,
) -> None:
    job = Interrupted(by)
    stock = launcher.__mro__[2]  # the launcher of Hydra's plugin
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda executor, function, *arguments: [job])
    monkeypatch.setattr(stock, "launch", lambda *_: submitit.AutoExecutor.map_array(None, None), raising=False)
    with pytest.raises(by):
        launcher(submitit_folder=tmp_path / "%j").launch([["pattern=2:4"]], 0)
    assert job.cancelled is cancelled
    if not cancelled:
        assert "the jobs of array 17 go on" in capsys.readouterr().err


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_folder_of_jobs_is_made_private_and_no_other_is_touched(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o755)
    for folder, made in (
        ("new/.submitit/%j", "new/.submitit"),
        ("logs/mine", "logs/mine"),
        ("logs/own/%A/%t", "logs/own"),
    ):
        _private(tmp_path / folder)
        assert mode(tmp_path / made) == 0o700
    assert mode(tmp_path / "new") != 0o700
    _private(logs / "%j")
    assert mode(logs) == 0o755


def test_a_folder_that_others_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(InputError, match="others can write to"):
        _private(tmp_path / "%j")
    assert mode(tmp_path) == 0o1777
