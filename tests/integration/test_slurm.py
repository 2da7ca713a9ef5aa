"""A sweep on a real Slurm, which this test installs, starts and stops; `pytest -m slurm -s` shows what happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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


def wait_for(what: str, found: object, timeout_s: float = 180) -> object:
    stop = time.monotonic() + timeout_s
    while time.monotonic() < stop:
        if value := found():  # type: ignore[operator]
            return value
        time.sleep(0.3)
    raise TimeoutError(what)


def test_a_cancelled_job_and_a_failed_node_cost_only_what_they_had_not_finished(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    print("\n" + slurm.call("sinfo", "-N"))
    driver = start(slurm, results, log)
    running = wait_for("three jobs run", lambda: jobs if len(jobs := slurm.jobs()) == 3 else None)
    assert isinstance(running, dict)
    print(slurm.call("squeue", "-r"))
    wait_for("a first cell", lambda: cell_folders(results))
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
    wait_for("the node is down", lambda: "down" in slurm.call("sinfo", "-h", "-N", "-n", node, "-o", "%T"), 60)
    print(slurm.call("sinfo", "-N") + slurm.call("squeue", "-r"))
    code = driver.wait(400)
    first = {folder.name: folder.stat().st_ino for folder in cell_folders(results)}
    print(f"the driver ended with {code}:\n{log.read_text()}")
    assert code == (0 if len(first) == 12 else 1)
    assert f"Slurm job {cancelled} left the queue without a result" in log.read_text() or len(first) == 12
    status = [sys.executable, "-m", "nmsweep", "status", f"results_dir={results}"]
    print(subprocess.run(status, capture_output=True, text=True).stdout)
    log.write_text("")
    assert start(slurm, results, log).wait(300) == 0
    print(f"the same command again:\n{log.read_text()}")
    assert len(cell_folders(results)) == 12
    assert first.items() <= {folder.name: folder.stat().st_ino for folder in cell_folders(results)}.items()
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())


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
    wait_for("the jobs end", lambda: not slurm.jobs() and not slurm.jobs("PD"), 300)
    first = made(results)
    print(f"the queue is empty, {len(first)} cells are there")
    assert len(first) == 12
    log.write_text("")
    assert start(slurm, results, log).wait(300) == 0
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
    assert driver.wait(60) == 130
    print(f"\n{log.read_text()}")
    assert ("go on: `nmsweep status` shows how far they are" in log.read_text()) == (number == signal.SIGTERM)
    wait_for("the jobs end", lambda: not slurm.jobs() and not slurm.jobs("PD") and not slurm.jobs("CG"), 300)
    print(f"{len(made(results))} cells are there")
    assert (len(made(results)) == 12) == (number == signal.SIGTERM)


def test_a_job_that_runs_out_of_time_goes_on_with_what_is_missing(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Slurm looks at limits every 30 s and warns that much earlier; the job then sends itself back to the queue."""
    results, log = tmp_path / "results", tmp_path / "log"
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1", "cluster.cells_per_job=96")
    driver = start(slurm, results, log, *limits, "criterion=act,wina,rms,clact", "pattern=2:4,4:8,8:16,16:32,1:4,3:4")
    (job,) = wait_for("the job runs", slurm.jobs)  # type: ignore[misc]
    wait_for("it was sent back", lambda: "Restarts=1" in slurm.call("scontrol", "show", "job", job, "-o"), 150)
    first = made(results)
    print(f"\njob {job} ran out of time with {len(first)} of 96 cells\n{slurm.call('squeue', '-r')}")
    assert 0 < len(first) < 96
    assert driver.wait(500) == 0, log.read_text()
    print(f"the driver ended with 0:\n{log.read_text()[-400:]}")
    assert len(made(results)) == 96
    assert first.items() <= made(results).items()
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())
