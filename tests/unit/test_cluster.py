"""Executors of clusters, without a cluster: which keys they take, what is cancelled when, which folders they make."""

import stat
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

from nmsweep.config.compose import compose_command
from nmsweep.config.schema import ClusterConfig
from nmsweep.errors import InputError
from nmsweep.progress import Display
from nmsweep.results.interrupt import Terminated
from nmsweep.sweep.executors import slurm
from nmsweep.sweep.executors.base import Executor, Launch, executor_of
from nmsweep.sweep.executors.local import SameProcess, WorkerProcesses
from nmsweep.sweep.executors.ray import RayTasks
from nmsweep.sweep.executors.slurm import LocalJobs, SlurmJobs, make_private
from nmsweep.sweep.plan import Batch, Plan, PlannedCell


def launcher(*words: str, config_dir: Path | None = None) -> Mapping[str, Any]:
    return compose_command(["model=tiny-llama", *words], multirun=True, config_dir=config_dir).launcher


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("basic", SameProcess),
        ("joblib", WorkerProcesses),
        ("submitit_local", LocalJobs),
        ("submitit_slurm", SlurmJobs),
        ("ray", RayTasks),
    ],
)
def test_each_launcher_is_one_executor(name: str, executor: type[Executor]) -> None:
    assert type(executor_of(launcher(f"hydra/launcher={name}"))) is executor


def test_a_preset_of_the_users_stands_on_a_shipped_one(tmp_path: Path) -> None:
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [submitit_slurm, _self_]\npartition: gpu\n")
    node = launcher("hydra/launcher=mine", "hydra.launcher.timeout_min=7", config_dir=tmp_path)
    assert isinstance(executor_of(node), SlurmJobs)
    assert (node["partition"], node["timeout_min"]) == ("gpu", 7)
    assert str(node["submitit_folder"]).startswith("results/.runs/")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("hydra/launcher=joblib", "+hydra.launcher.n_jobs=2"), "hydra.launcher.n_jobs: is no key of WorkerProcesses"),
        (("hydra/launcher=submitit_local", "+hydra.launcher.cores=2"), "Unknown argument 'cores'"),
        (("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=long"), '"timeout_min" expected type'),
        (("hydra/launcher=ray", "+hydra.launcher.ray.start.num_cpus=2"), "hydra.launcher.ray.start: is no key"),
        (("hydra.launcher._target_=os.system",), "_target_ is os.system, no executor of nmsweep"),
        (("hydra.launcher._target_=os.nothing",), "_target_ os.nothing cannot be imported"),
    ],
)
def test_a_launcher_that_cannot_run_is_one_message(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(InputError) as error:
        executor_of(launcher(*words)).check()
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def launch_of(*models: str, cells_per_job: int | None = None, workers: int | None = None) -> Launch:
    """A launch of one cell for each model named."""
    cells = [PlannedCell(f"c{n}", "0" * 12, "0" * 12, "", "", model, False, {}) for n, model in enumerate(models)]
    cluster = ClusterConfig(cells_per_job=cells_per_job, workers=workers)
    return Launch(Plan((), tuple(cells), Path("results")), tuple(range(len(models))), "0" * 12, Path("logs"), cluster)


def test_a_slurm_job_has_cells_of_one_model() -> None:
    batches = SlurmJobs("x").share(launch_of("a", "a", "a", "a", "a", "b", cells_per_job=2))
    assert [batch.indices for batch in batches] == [(0,), (1, 2), (3, 4), (5,)]
    assert {(batch.worker, batch.n_workers) for batch in batches} == {(0, 1)}
    assert len({batch.log_dir for batch in batches}) == 4


@pytest.mark.parametrize("executor", [WorkerProcesses(), LocalJobs("x")])
def test_each_local_worker_has_all_cells_and_begins_elsewhere(executor: Executor) -> None:
    batches = executor.share(launch_of("a", "a", "b", workers=2))
    assert [batch.indices for batch in batches] == [(0, 1, 2), (1, 2, 0)]
    assert [(batch.worker, batch.n_workers) for batch in batches] == [(0, 2), (1, 2)]


class Job:
    """A job of an array, and the files that it may leave."""

    def __init__(self, number: int, has_result: Any) -> None:
        self.job_id = f"17_{number}"
        self.cancelled = False
        self.paths = SimpleNamespace(result_pickle=SimpleNamespace(exists=has_result), stderr="err")

    def results(self) -> list[None]:
        return [None]

    def cancel(self, check: bool) -> None:
        self.cancelled = True


def batches(n: int) -> list[Batch]:
    return [Batch(Path("results"), "", "", (number, number + n), Path("logs")) for number in range(n)]


@pytest.mark.parametrize(
    ("executor", "by", "cancelled"),
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
    executor: Any,
    by: type[KeyboardInterrupt],
    cancelled: bool,
) -> None:
    def stop() -> bool:
        raise by

    job = Job(0, stop)
    jobs = SimpleNamespace(map_array=lambda function, batches: [job])
    monkeypatch.setattr(executor, "_executor", lambda self, folder: jobs)
    with pytest.raises(by):
        executor(str(tmp_path / "%j")).run(batches(1), Plan((), (), tmp_path), Display(quiet=True))
    assert job.cancelled is cancelled
    if not cancelled:
        assert "the jobs of array 17 go on" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["17_1\n", "", "slurm_load_jobs error: Invalid job id specified"])
def test_a_job_that_leaves_the_queue_without_a_result_costs_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Job 1 ends with a result after some looks at the queue; job 0 is never listed."""
    looks = []

    def squeue(*command: Any, **options: Any) -> SimpleNamespace:
        looks.append(command)
        failed = "error" in answer
        return SimpleNamespace(returncode=failed, stdout="" if failed else answer, stderr=answer if failed else "")

    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    monkeypatch.setattr(slurm.subprocess, "run", squeue)
    array = [Job(0, lambda: False), Job(1, lambda: len(looks) >= (6 if "17_1" in answer else 1))]
    monkeypatch.setattr(SlurmJobs, "_executor", lambda self, folder: SimpleNamespace(map_array=lambda *_: array))
    lost = SlurmJobs(str(tmp_path / "%j")).run(batches(2), Plan((), (), tmp_path), Display(quiet=True))
    assert set(lost) == {0, 2}
    assert "Slurm job 17_0 left the queue without a result (its log: err)" in lost[0]


def test_a_squeue_that_does_not_answer_loses_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def squeue(*command: Any, **options: Any) -> SimpleNamespace:
        looks.append(command)
        if len(looks) % 2:
            raise OSError("no squeue")
        return SimpleNamespace(returncode=1, stdout="", stderr="Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    monkeypatch.setattr(slurm.subprocess, "run", squeue)
    array = [Job(0, lambda: len(looks) > 8)]
    monkeypatch.setattr(SlurmJobs, "_executor", lambda self, folder: SimpleNamespace(map_array=lambda *_: array))
    assert SlurmJobs(str(tmp_path / "%j")).run(batches(1), Plan((), (), tmp_path), Display(quiet=True)) == {}


def test_a_job_that_runs_out_of_time_is_submitted_again_as_it_was() -> None:
    job, (batch,) = slurm.SubmititJob(), batches(1)
    again = job.checkpoint(batch)
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args) == (job, (batch,))


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
        make_private(tmp_path / folder)
        assert mode(tmp_path / made) == 0o700
    assert mode(tmp_path / "new") != 0o700
    make_private(logs / "%j")
    assert mode(logs) == 0o755


def test_a_folder_that_others_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(InputError, match="others can write to"):
        make_private(tmp_path / "%j")
    assert mode(tmp_path) == 0o1777
