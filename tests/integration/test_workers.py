"""Several workers on one machine, the process that was started among them: what each does, and what is left when one goes."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Run, run

from nmsweep.results.claims import all_claims
from nmsweep.results.owner import Owner
from nmsweep.results.read import read_results
from nmsweep.results.record import cell_folders
from nmsweep.sweep.executors import local

SWEEP = (
    "-m", "model=tiny-llama", "dtype=float32", "device=cpu", "eval.limit=64", "eval.seqlen=32", "tasks=mini_science",
    "baseline=false", "pattern=2:4,4:8,8:16,1:4", "mitigation=none,shift,var,shift+var",
)  # fmt: skip
"""16 cells."""


def start(results: Path) -> Run:
    return Run(words(results, 2), results.parent / "log")


def words(results: Path, n_workers: int) -> list[str]:
    return [*SWEEP, "hydra/launcher=joblib", f"cluster.workers={n_workers}", f"results_dir={results}"]


def other(results: Path, process: Run) -> Owner:
    """The worker beside the process that was started, when it is at a cell and another one is there."""
    stop = time.monotonic() + 120
    while time.monotonic() < stop:
        for claim in all_claims(results) if cell_folders(results) else ():
            if claim.owner and claim.owner.pid != process.pid:
                return claim.owner
        time.sleep(0.002)
    raise TimeoutError(process.said)


def tidy(results: Path) -> str:
    return str(read_results(results).tidy.to_csv(index=False))


def begun(results: Path) -> list[list[str]]:
    """The cells that each worker began, by its log."""
    logs = sorted(results.glob(".runs/*/*/nmsweep.log"))
    lines = [log.read_text().splitlines() for log in logs]
    return [[line.rpartition(": ")[2] for line in one if "cell begins: " in line] for one in lines]


def test_two_workers_do_each_cell_once_and_the_table_is_that_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(words(one, 1), tmp_path / "log")
    process = run(words(two, 2), tmp_path / "log")
    mine, its = begun(two)
    assert mine
    assert its
    assert sorted(mine + its) == [folder.name for folder in cell_folders(two)]
    assert len(cell_folders(two)) == 16
    assert tidy(one) == tidy(two)
    assert process.said.count("done by another process") == len(its)
    assert [f"[{at}/16] " in process.said for at in range(1, 17)] == [True] * 16
    assert not list(two.rglob(".tmp*"))
    assert not list((two / ".claims").iterdir())


def test_the_cells_of_a_worker_that_is_killed_are_done_by_the_others(tmp_path: Path) -> None:
    results = tmp_path / "results"
    process = start(results)
    worker = other(results, process)
    os.kill(worker.pid, signal.SIGKILL)
    assert process.end() == 0
    assert f"worker process {worker.pid} was ended by signal 9; others did its cells" in process.said
    assert len(cell_folders(results)) == 16
    assert not list((results / ".claims").iterdir())


@pytest.mark.parametrize(("n_gpus", "method"), [(0, "forkserver"), (2, "spawn")])
def test_workers_are_spawned_where_an_import_may_start_cuda(
    monkeypatch: pytest.MonkeyPatch, n_gpus: int, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert local._context().get_start_method() == method


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_stop_with_the_process_that_was_started(tmp_path: Path, number: signal.Signals) -> None:
    results = tmp_path / "results"
    process = start(results)
    worker = other(results, process)
    if number == signal.SIGINT:  # from a terminal it reaches both
        os.kill(worker.pid, number)
    process.send(number)
    assert process.end() == (130 if number == signal.SIGINT else -number)
    stop = time.monotonic() + 60
    while worker.is_alive() and time.monotonic() < stop:
        time.sleep(0.01)
    assert not worker.is_alive()
    assert "Traceback" not in process.said
    n_done = len(cell_folders(results))
    assert 0 < n_done < 16
    if number == signal.SIGINT:
        assert process.said.count("stopping; once more to stop at once") == 1
        assert not list(results.rglob(".tmp*"))
        assert not list((results / ".claims").iterdir())
    again = run(words(results, 1), tmp_path / "again")
    assert f"16 cells, {n_done} exist already" in again.said
    assert len(cell_folders(results)) == 16
    assert not list(results.rglob(".tmp*"))
