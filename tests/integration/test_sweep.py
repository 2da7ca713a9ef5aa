"""Sweeps of real processes: resume, many processes on one folder, launchers, status, retry, leftovers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos.kill import chaos
from processes import Run, run

from nmsweep.cell.session import Session
from nmsweep.config.schema import ClusterConfig
from nmsweep.progress import Display
from nmsweep.results.claims import take
from nmsweep.results.layout import failure_folder
from nmsweep.results.owner import Owner, temporary_name
from nmsweep.results.read import read_results
from nmsweep.results.record import cell_folders, failure_of, write_failure
from nmsweep.results.storage import why_unwritable
from nmsweep.sweep import work
from nmsweep.sweep.executors import base
from nmsweep.sweep.executors.base import Executor, Launch
from nmsweep.sweep.plan import Batch, Plan, load, plan_ids

Call = Callable[..., tuple[int, str, str]]
TINY = (
    "-m", "model=tiny-llama", "dtype=float32", "eval.limit=4", "eval.seqlen=32", "tasks=mini_science",
    "calibration.n_samples=2", "calibration.seqlen=32",
)  # fmt: skip


def command(results: Path, *words: str) -> list[str]:
    return [*TINY, *words, f"results_dir={results}"]


def launches(results: Path) -> set[str]:
    return {json.loads((f / "provenance.json").read_text())["launch"] for f in cell_folders(results)}


def times_computed(results: Path) -> dict[str, int]:
    """How often each cell was begun, by the logs of all processes."""
    counts: dict[str, int] = {}
    for file in results.glob(".runs/*/**/*.log"):
        for line in file.read_text().splitlines():
            if "cell begins: " in line:
                name = line.rpartition("cell begins: ")[2]
                counts[name] = counts.get(name, 0) + 1
    return counts


def tidy(results: Path) -> str:
    text: str = read_results(results).tidy.to_csv(index=False)
    return text


def concurrency(tmp_path: Path, n_processes: int, words: tuple[str, ...], n_cells: int) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(command(alone, *words), tmp_path / "alone.log")
    processes = [Run(command(together, *words), tmp_path / f"{n}.log") for n in range(n_processes)]
    assert [process.end() for process in processes] == [0] * n_processes, [p.said for p in processes]
    assert len(cell_folders(together)) == n_cells
    assert times_computed(together) == {folder.name: 1 for folder in cell_folders(together)}
    assert not list((together / ".claims").iterdir())
    assert not list(together.rglob(".tmp*"))
    assert tidy(alone) == tidy(together)


def test_processes_on_one_folder_compute_each_cell_once(tmp_path: Path) -> None:
    concurrency(tmp_path, 3, ("pattern=2:4,4:8,8:16", "mitigation=none,shift_static"), 7)


@pytest.mark.slow
def test_eight_processes_compute_forty_cells_once_each(tmp_path: Path) -> None:
    words = ("pattern=2:4,4:8,8:16,16:32,3:4", "mitigation=none,shift,var,shift_static", "criterion=act,rms")
    concurrency(tmp_path, 8, words, 41)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_give_the_same_table(tmp_path: Path, launcher: str) -> None:
    words = ("pattern=2:4,8:16", f"hydra/launcher={launcher}", "cluster.workers=2")
    done = run(command(tmp_path / "r", *words), tmp_path / "log")
    assert "3 cells in 2 jobs" in done.said
    assert set(times_computed(tmp_path / "r").values()) == {1}
    assert len(launches(tmp_path / "r")) == 1
    run(command(tmp_path / "here", *words[:1]), tmp_path / "log")
    assert tidy(tmp_path / "here") == tidy(tmp_path / "r")


class OtherJobs(Executor):
    """An executor whose jobs left every cell to another sweep, to which something happens a moment later."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches([launch.pending])

    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> dict[int, str]:
        threading.Timer(0.3, self.happens).start()
        return {}


@pytest.mark.parametrize("ends", ["done", "failed", "killed"])
def test_cells_of_another_sweep_are_waited_for(
    nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.setattr(base, "POLL_S", 0.05)
    assert nmsweep(*command(results, "pattern=2:4", "baseline=false"))[0] == 0
    (folder,) = cell_folders(results)
    plan = load(results, plan_ids(results)[0])
    folder.rename(results / "aside")
    claim = take(results, plan.cells[0].part_id, folder.name)
    assert claim is not None

    def happens() -> None:
        if ends == "done":
            (results / "aside").rename(folder)
        elif ends == "failed":
            write_failure(failure_folder(results, folder.name), {}, {"error": "boom", "launch": "of another"})
        claim.unlink()

    launch = Launch(plan, (0,), "0" * 12, results / ".runs", ClusterConfig())
    errors = OtherJobs(happens).execute(launch)
    assert list(errors) == ([] if ends == "done" else [folder.name])
    assert {"done": "", "failed": "boom", "killed": "no record of it is there"}[ends] in errors.get(folder.name, "")


def test_cells_that_differ_in_their_tasks_wait_for_each_other(nmsweep: Call, results: Path) -> None:
    words = [word for word in TINY if not word.startswith("tasks=")]
    words = [*words, "tasks=mini_science,mini_yesno", "pattern=2:4", "baseline=false", f"results_dir={results}"]
    assert nmsweep(*words)[0] == 0
    for folder in cell_folders(results):
        shutil.rmtree(folder)
    plan = load(results, plan_ids(results)[0])
    one, other = plan.cells
    assert one.part_id == other.part_id
    claim = take(results, one.part_id, one.name)
    assert claim is not None
    threading.Timer(0.5, claim.unlink).start()
    work.work(plan, [1], Session(), patient=False)
    assert [folder.name for folder in cell_folders(results)] == [other.name]


def test_chaos_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    chaos(tmp_path, n_kills=5, seed=1)


def test_cells_are_ordered_so_that_models_and_states_are_reused(nmsweep: Call, results: Path) -> None:
    code, out, err = nmsweep(
        "plan", *TINY[:1], "model=tiny-llama,tiny-qwen2", *TINY[2:],
        "mitigation=shift_static,none", "pattern=2:4,8:16", f"results_dir={results}",
    )  # fmt: skip
    assert code == 0, err
    names = [line.split()[0].rpartition("_")[0] for line in out.splitlines() if line.startswith("tiny")]
    assert names == [
        f"{model}_{rest}"
        for model in ("tiny-llama", "tiny-qwen2")
        for rest in (
            "dense_none_none",
            "2-4_act_none",
            "8-16_act_none",
            "2-4_act_shift-static",
            "8-16_act_shift-static",
        )
    ]
    assert not results.exists()


def test_status_tells_done_failed_and_missing_and_retry_runs_the_failed(
    nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nmsweep.evaluate import harness

    measure = harness.measure

    def fail_when_shifted(model: object, *args: object, **kwargs: object) -> object:
        layers = [m for m in model.modules() if type(m).__name__ == "SparseLinear"]  # type: ignore[attr-defined]
        if layers and layers[0].slots.eta is not None:
            raise RuntimeError("boom")
        return measure(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "measure", fail_when_shifted)
    words = (*TINY, "pattern=2:4,8:16", "mitigation=none,shift", f"results_dir={results}")
    code, _, err = nmsweep(*words)
    assert code == 1
    assert err.count("boom") == 4  # where it happens, and in the end
    code, out, _ = nmsweep("status", f"results_dir={results}")
    assert code == 1
    assert "5 cells: 3 done, 0 running, 2 failed, 0 missing" in out
    assert out.count("RuntimeError: boom") == 2
    monkeypatch.setattr(harness, "measure", measure)
    kept = {folder: folder.stat().st_ino for folder in cell_folders(results)}
    code, _, err = nmsweep("retry", f"results_dir={results}")
    assert code == 0, err
    assert "5 cells, 3 exist already, 2 to run" in err
    assert "5 cells: 5 done, 0 running, 0 failed, 0 missing" in nmsweep("status", f"results_dir={results}")[1]
    assert {folder: folder.stat().st_ino for folder in kept} == kept
    assert not list((results / "failed").iterdir())


def fail(cell: Path) -> None:
    """Make a finished cell a failed one."""
    shutil.rmtree(cell)
    write_failure(failure_folder(cell.parent.parent, cell.name), {}, {"error": "boom"})


def test_retry_in_a_process_of_its_own_takes_a_launcher_of_the_users(nmsweep: Call, results: Path) -> None:
    assert nmsweep(*TINY, "pattern=2:4,8:16", f"results_dir={results}")[0] == 0
    own = results.parent / "own"
    (own / "hydra" / "launcher").mkdir(parents=True)
    (own / "hydra" / "launcher" / "mine.yaml").write_text("defaults: [joblib, _self_]\n")
    code, _, err = nmsweep("retry", "--config-dir", str(own / "none"), f"results_dir={results}")
    assert (code, err.count("\n")) == (2, 2)  # the command, the mistake
    assert "is no folder" in err
    for words in ((), ("--config-dir", str(own), "hydra/launcher=mine", "cluster.workers=1")):
        fail(cell_folders(results)[0])
        again = run(["retry", *words, f"results_dir={results}"], results.parent / "log")
        assert "3 cells, 2 exist already, 1 to run" in again.said
        assert len(cell_folders(results)) == 3
    code, _, err = nmsweep("retry", f"results_dir={results}")
    assert (code, err.count("\n")) == (2, 1)
    assert "--config-dir may run code from outside nmsweep" in err  # whoever wrote the plan chose the folder


def test_a_plan_counts_what_would_run(nmsweep: Call, results: Path) -> None:
    words = command(results, "pattern=2:4,8:16")
    assert nmsweep(*words)[0] == 0
    assert "3 cells, 3 exist" in nmsweep("plan", *words)[1]
    os.truncate(cell_folders(results)[0] / "samples.parquet", 10)
    out = nmsweep("plan", *words)[1]
    assert "3 cells, 2 exist" in out
    assert "1 to run" in out
    out = nmsweep("plan", *words, "force=true")[1]
    assert "3 cells, 0 exist" in out
    assert "3 to run" in out
    assert "  exists" not in out


def test_status_of_a_killed_sweep_names_what_is_missing_and_the_time_left(nmsweep: Call, results: Path) -> None:
    words = command(results, "pattern=2:4,4:8,8:16,16:32", "mitigation=none,shift,var")
    process = Run(words, results.parent / "log")
    assert process.until("[4/13]")
    process.send(signal.SIGSTOP)
    code, out, _ = nmsweep("status", f"results_dir={results}")
    assert code == 0
    assert "1 running" in out
    assert f"process {process.pid} on" in out
    process.send(signal.SIGKILL)
    process.end()
    code, out, _ = nmsweep("status", f"results_dir={results}")
    assert "0 running, 0 failed" in out
    assert "time left: about" in out
    before = {folder.name: folder.stat().st_ino for folder in cell_folders(results)}
    again = run(words, results.parent / "log")
    assert f"13 cells, {len(before)} exist already, {13 - len(before)} to run" in again.said
    assert before.items() <= {folder.name: folder.stat().st_ino for folder in cell_folders(results)}.items()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_cleanly_and_the_same_command_goes_on(results: Path, number: signal.Signals) -> None:
    words = command(results, "pattern=2:4,4:8,8:16", "mitigation=none,shift")
    process = Run(words, results.parent / "log")
    assert process.until("[3/7]")
    process.send(number)
    assert process.end() == 130
    assert "interrupted; what was finished is kept" in process.said
    assert "Traceback" not in process.said
    assert not list(results.rglob(".tmp*"))
    assert not list((results / ".claims").iterdir())
    assert 2 <= len(cell_folders(results)) < 7
    run(words, results.parent / "log")
    assert len(cell_folders(results)) == 7


def test_leftovers_are_listed_and_removed_with_a_word(nmsweep: Call, results: Path) -> None:
    assert nmsweep(*TINY, "pattern=2:4", "baseline=false", f"results_dir={results}")[0] == 0
    dead = results / "cells" / f".tmp_{Owner('vm', '0' * 8, 1, 1)}_abcdef01"
    dead.mkdir()
    (dead / "metrics.csv").write_text("half")
    os.utime(dead, (0, 0))
    alive = results / "cells" / temporary_name()
    alive.mkdir()
    code, out, _ = nmsweep("gc", f"results_dir={results}")
    assert code == 0
    assert "1 leftovers" in out
    assert dead.exists()
    assert "1 removed" in nmsweep("gc", "remove", f"results_dir={results}")[1]
    assert alive.exists()
    assert not dead.exists()
    assert len(cell_folders(results)) == 1


def test_a_plan_that_was_changed_is_refused(nmsweep: Call, results: Path) -> None:
    assert nmsweep(*TINY, "pattern=2:4", "baseline=false", f"results_dir={results}")[0] == 0
    (plan_id,) = plan_ids(results)
    file = results / ".plans" / f"{plan_id}.json"
    file.write_text(file.read_text().replace("mini_science", "mini_yesno"))
    for subcommand in ("status", "retry"):
        code, _, err = nmsweep(subcommand, f"results_dir={results}")
        assert code == 2
        assert "its content is not what its name says" in err


@pytest.mark.parametrize("harm", ["{", "", None])
def test_a_damaged_plan_is_written_again_by_its_command(nmsweep: Call, results: Path, harm: str | None) -> None:
    words = command(results, "pattern=2:4", "baseline=false")
    assert nmsweep(*words)[0] == 0
    (plan_id,) = plan_ids(results)
    file = results / ".plans" / f"{plan_id}.json"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"mini_science", b"mini_sciense") if harm is None else harm.encode())
    assert nmsweep("status", f"results_dir={results}")[0] == 2
    assert nmsweep(*words)[0] == 0
    assert file.read_bytes() == whole
    assert nmsweep("status", f"results_dir={results}")[0] == 0


def test_commands_that_start_together_on_a_new_folder_can_all_write_there(tmp_path: Path) -> None:
    def start(number: int) -> str:
        errors = why_unwritable(tmp_path / str(number // 8) / "results")
        (tmp_path / str(number // 8) / "results" / ".plans").mkdir(parents=True, exist_ok=True)
        return errors

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(start, range(400))) == [""] * 400


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, why in (("file/results", "Not a directory"), ("link", "No such file"), ("x" * 300, "too long")):
        assert why in why_unwritable(tmp_path / place)


def test_a_plan_comes_back_as_it_was_stored(nmsweep: Call, results: Path) -> None:
    assert nmsweep(*TINY, "pattern=2:4,8:16", f"results_dir={results}")[0] == 0
    (plan_id,) = plan_ids(results)
    plan = load(results, plan_id)
    assert plan.plan_id == plan_id
    assert [plan.config(cell).pattern.is_dense for cell in plan.cells] == [True, False, False]
    assert all(failure_of(results / "failed" / cell.name) is None for cell in plan.cells)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, time
from pathlib import Path
from nmsweep.results.interrupt import interruptible
from nmsweep.results.storage import whole_folder
with interruptible(), whole_folder(Path({str(tmp_path / "cells" / "one")!r})) as place:
    (place / "a").write_text("a")
    print("writing", flush=True)
    sys.stderr = None  # as where a library is kept quiet
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # the write is being finished
        assert process.stderr is not None
        assert process.stderr.readline() == b"nmsweep: stopping; once more to stop at once\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not (tmp_path / "cells" / "one").exists()
