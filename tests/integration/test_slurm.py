"""A sweep on a real Slurm, which this test installs, starts and stops; `pytest -m slurm -s` shows what happens."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.local_slurm import LocalSlurm, why_not

from nmsweep.results.record import cell_folders

pytestmark = pytest.mark.slurm

SWEEP = (
    "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
    "cluster.cells_per_job=2", "model=tiny-llama", "dtype=float32", "eval.seqlen=64", "tasks=mini", "baseline=false",
    "pattern=2:4,4:8,8:16", "mitigation=none,shift,var,shift+var",
)  # fmt: skip
"""12 cells, 6 jobs."""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[LocalSlurm]:
    if problem := why_not():
        pytest.skip(problem)
    with LocalSlurm(tmp_path / "slurm") as running:
        yield running


def start(slurm: LocalSlurm, results: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = {**slurm.environment, "NMSWEEP_SQUEUE_POLL_S": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, "-m", "nmsweep", *SWEEP, *more, f"results_dir={results}"]
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file)


STANDSTILL_S = 240
"""Seconds in which nothing moved, neither a cell nor the queue, before a wait is given up."""


def wait_for(what: str, condition: Callable[[], Any], progress: Callable[[], object] = lambda: None) -> Any:
    """Wait until a condition holds, as long as `progress` keeps changing; return its value."""
    seen, since = progress(), time.monotonic()
    while time.monotonic() - since < STANDSTILL_S:
        if value := condition():
            return value
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.3)
    raise TimeoutError(f"{what}: nothing moved for {STANDSTILL_S} s; last seen: {seen}")


def end_of(driver: subprocess.Popen[bytes], slurm: LocalSlurm, results: Path) -> int:
    """Wait for the end of a command, as long as its cells or the queue move; return its exit code."""
    wait_for("the command ends", lambda: driver.poll() is not None, lambda: moving(slurm, results))
    return int(driver.returncode)


def moving(slurm: LocalSlurm, results: Path) -> object:
    """Whatever changes while a sweep works: its finished tasks and cells, its log files, the queue."""
    files = [file for name in ("cells", ".parts", ".runs") for file in results.glob(f"{name}/**/*") if file.is_file()]
    queue = slurm.call("squeue", "-h", "-r", "-o", "%i %T", check=False)
    return len(files), sum(file.stat().st_size for file in files if file.exists()), queue


def test_a_cancelled_job_and_a_failed_node_cost_only_what_they_had_not_finished(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    print("\n" + slurm.call("sinfo", "-N"))
    driver = start(slurm, results, log)
    running = wait_for("three jobs run", lambda: jobs if len(jobs := slurm.jobs()) == 3 else None)
    print(slurm.call("squeue", "-r"))
    wait_for("a first cell", lambda: cell_folders(results), lambda: moving(slurm, results))
    running = slurm.jobs()
    assert len(running) == 3
    cancelled, failing, preempted = running
    slurm.call("scontrol", "requeue", preempted)
    slurm.call("scancel", cancelled)
    node = running[failing]
    slurm.fail_node(node)
    print(
        f"cancelled job {cancelled}; sent job {preempted} back to the queue; node {node}, where job {failing} ran, is dead"
    )
    wait_for("the node is down", lambda: "down" in slurm.call("sinfo", "-h", "-N", "-n", node, "-o", "%T"))
    print(slurm.call("sinfo", "-N") + slurm.call("squeue", "-r"))
    code = end_of(driver, slurm, results)
    first = {folder.name: folder.stat().st_ino for folder in cell_folders(results)}
    print(f"the driver ended with {code}:\n{log.read_text()}")
    assert code == (0 if len(first) == 12 else 1)
    assert f"Slurm job {cancelled} left the queue without a result" in log.read_text() or len(first) == 12
    status = [sys.executable, "-m", "nmsweep", "status", f"results_dir={results}"]
    print(subprocess.run(status, capture_output=True, text=True).stdout)
    log.write_text("")
    assert end_of(start(slurm, results, log), slurm, results) == 0
    print(f"the same command again:\n{log.read_text()}")
    assert len(cell_folders(results)) == 12
    assert first.items() <= {folder.name: folder.stat().st_ino for folder in cell_folders(results)}.items()
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())


def jobs_end(slurm: LocalSlurm, results: Path) -> None:
    def ended() -> bool:
        return not any(slurm.jobs(state) for state in ("R", "PD", "CG"))

    wait_for("the jobs end", ended, lambda: moving(slurm, results))


def made(results: Path) -> dict[str, int]:
    """The folder of each finished cell with its inode: one that is computed again gets another."""
    return {folder.name: folder.stat().st_ino for folder in cell_folders(results)}


def test_the_command_that_submitted_may_be_killed(slurm: LocalSlurm, tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    driver = start(slurm, results, log)
    wait_for("three jobs run", lambda: len(slurm.jobs()) == 3)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    print(f"\nthe driver is killed, {len(made(results))} cells are there\n{slurm.call('squeue', '-r')}")
    jobs_end(slurm, results)
    first = made(results)
    print(f"the queue is empty, {len(first)} cells are there")
    assert len(first) == 12
    log.write_text("")
    assert end_of(start(slurm, results, log), slurm, results) == 0
    print(f"the same command again:\n{log.read_text()}")
    assert "all 12 cells exist" in log.read_text()
    assert made(results) == first
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sigterm_leaves_the_array_and_ctrl_c_cancels_it(
    slurm: LocalSlurm, tmp_path: Path, number: signal.Signals
) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    driver = start(slurm, results, log)
    wait_for("three jobs run", lambda: len(slurm.jobs()) == 3)
    driver.send_signal(number)
    assert end_of(driver, slurm, results) == 130
    print(f"\n{log.read_text()}")
    assert ("go on: `nmsweep status` shows how far they are" in log.read_text()) == (number == signal.SIGTERM)
    jobs_end(slurm, results)
    print(f"{len(made(results))} cells are there")
    assert (len(made(results)) == 12) == (number == signal.SIGTERM)


def test_a_job_that_runs_out_of_time_goes_on_with_what_is_missing(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Slurm looks at limits every 30 s and warns that much earlier; the job then sends itself back to the queue."""
    results, log = tmp_path / "results", tmp_path / "log"
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1", "cluster.cells_per_job=48")
    driver = start(slurm, results, log, *limits, "criterion=act,wina", "pattern=2:4,4:8,8:16,16:32,1:4,3:4")
    (job,) = wait_for("the job runs", slurm.jobs)
    back = r"Restarts=[1-9]"
    wait_for(
        "it is sent back",
        lambda: re.search(back, slurm.call("scontrol", "show", "job", job, "-o")) and made(results),
        lambda: moving(slurm, results),
    )
    first = made(results)
    print(f"\njob {job} ran out of time with {len(first)} of 48 cells\n{slurm.call('squeue', '-r')}")
    assert 0 < len(first) < 48
    assert end_of(driver, slurm, results) == 0, log.read_text()
    print(f"the driver ended with 0:\n{log.read_text()[-400:]}")
    assert len(made(results)) == 48
    assert first.items() <= made(results).items()
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())
