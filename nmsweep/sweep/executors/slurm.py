"""Jobs through submitit: of a Slurm array, or processes of this machine on the same path.

A job that is cancelled or dies with its node costs its own cells only. Submitit alone would raise at the first such job
while others run, and would wait for it without end on a cluster without accounting.
"""

import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from nmsweep.errors import InputError
from nmsweep.progress import Display
from nmsweep.results.interrupt import Terminated
from nmsweep.sweep.executors.base import Executor, Launch, by_model, rotated
from nmsweep.sweep.executors.local import n_workers
from nmsweep.sweep.plan import Batch, Plan

log = logging.getLogger(__name__)

POLL_S = float(os.environ.get("NMSWEEP_SQUEUE_POLL_S", "10"))
"""Seconds between two looks at Slurm's queue."""

N_MISSES = 3
"""Looks in a row at which a job without a result is not in the queue before it counts as lost."""

SEEN_GPUS = "NMSWEEP_SEEN_GPUS"
"""Environment variable: the user's CUDA_VISIBLE_DEVICES (``all`` for none), for jobs from which submitit hides it."""

GENERIC = [
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
]
"""Parameters that submitit takes without its cluster's prefix."""


class JobLostError(Exception):
    """A job ended without a result."""


class SubmititJob:
    """The callable of a job: picklable, with submitit's checkpoint protocol, so that Slurm requeues it on time-out."""

    def __call__(self, batch: Batch) -> None:
        see_gpus()
        from nmsweep.sweep.work import run_batch

        run_batch(batch, Display(len(batch.indices)))

    def checkpoint(self, batch: Batch) -> Any:
        """Return the same call: the results folder knows what is done of it."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, batch)


class _Submitit(Executor):
    """Batches as jobs of a submitit executor.

    Args:
        submitit_folder: where submitit keeps its files; may have parts such as ``%j``, which it fills in for each job.
        max_num_timeout: how often a job that ran out of time is queued again.
        parameters: of submitit: its generic ones, and those of its cluster.
    """

    cluster: ClassVar[str]

    def __init__(self, submitit_folder: str, max_num_timeout: int | None = None, **parameters: Any) -> None:
        self.folder = Path(submitit_folder)
        self._arguments = {} if max_num_timeout is None else {f"{self.cluster}_max_num_timeout": max_num_timeout}
        self._parameters = {
            key if key in GENERIC else f"{self.cluster}_{key}": value for key, value in parameters.items()
        }

    def check(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._executor(Path(folder))

    def _executor(self, folder: Path) -> Any:
        """Return submitit's executor with all parameters set.

        Raises:
            InputError: submitit or Slurm is missing, or a parameter is not accepted.
        """
        try:
            import submitit
        except ImportError as error:
            raise InputError("hydra/launcher: submitit is not installed; pip install 'nmsweep[cluster]'") from error
        try:
            executor = submitit.AutoExecutor(folder, cluster=self.cluster, **self._arguments)
            executor.update_parameters(**self._parameters)
        except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            message = " ".join(str(error).partition("\nKnown executors")[0].split())
            raise InputError(f"hydra.launcher: submitit refuses: {message}") from error
        return executor

    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> Mapping[int, str]:
        make_private(self.folder)
        submitted: list[Any] = []
        try:
            submitted += self._executor(self.folder).map_array(SubmititJob(), batches)
            return self._wait(submitted, batches)
        except KeyboardInterrupt as interrupt:
            self._stop(submitted, interrupt)
            raise

    def _wait(self, jobs: Sequence[Any], batches: Sequence[Batch]) -> dict[int, str]:
        """Wait for every job; return the cells of lost ones."""
        waiting = {str(job.job_id): (job, batch) for job, batch in zip(jobs, batches, strict=True)}
        lost: dict[int, str] = {}
        while waiting:
            for name, (job, batch) in list(waiting.items()):
                try:
                    if self._has_ended(name, job):
                        job.results()
                        del waiting[name]
                except Exception as error:  # submitit raises a dozen kinds; each means that this job gave nothing
                    log.warning("job %s: %s", name, error)
                    lost.update(dict.fromkeys(batch.indices, str(error)))
                    del waiting[name]
            self._look_at_queue(list(waiting))
            time.sleep(0.2)
        return lost

    def _has_ended(self, name: str, job: Any) -> bool:
        """Return whether a job has a result or will have none.

        Raises:
            JobLostError: it is known to have been lost.
        """
        return bool(job.paths.result_pickle.exists() or job.done())

    def _look_at_queue(self, waiting: Sequence[str]) -> None:
        """Look for jobs that were lost."""

    def _stop(self, jobs: Sequence[Any], interrupt: KeyboardInterrupt) -> None:
        """Cancel the jobs: this process was told to stop."""
        for job in jobs:
            job.cancel(check=False)


class SlurmJobs(_Submitit):
    """`hydra/launcher=submitit_slurm`: an array of jobs, each with cells of one model."""

    cluster = "slurm"

    def __init__(self, submitit_folder: str, max_num_timeout: int | None = None, **parameters: Any) -> None:
        super().__init__(submitit_folder, max_num_timeout, **parameters)
        self._misses: dict[str, int] = {}
        self._last_look = 0.0

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches(by_model(launch))

    def _has_ended(self, name: str, job: Any) -> bool:
        if job.paths.result_pickle.exists():
            return True
        if self._misses.get(name, 0) >= N_MISSES:
            raise JobLostError(f"Slurm job {name} left the queue without a result (its log: {job.paths.stderr})")
        return False

    def _look_at_queue(self, waiting: Sequence[str]) -> None:
        """Count for each job how often in a row `squeue` did not list it, which needs no accounting."""
        if not waiting or time.monotonic() - self._last_look < POLL_S:
            return
        self._last_look = time.monotonic()
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={_array(waiting[0])}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return
        queued = set(answer.stdout.split())
        self._misses = {job: 0 if job in queued else self._misses.get(job, 0) + 1 for job in waiting}

    def _stop(self, jobs: Sequence[Any], interrupt: KeyboardInterrupt) -> None:
        """Cancel the array on Ctrl-C; leave it alone on a SIGTERM, which means this process only (a log-out, a restart)."""
        if not isinstance(interrupt, Terminated):
            super()._stop(jobs, interrupt)
        elif jobs:
            array = _array(str(jobs[0].job_id))
            how = f"`nmsweep status` shows how far they are, `scancel {array}` stops them"
            print(f"nmsweep: terminated; the jobs of array {array} go on: {how}", file=sys.stderr, flush=True)


class LocalJobs(_Submitit):
    """`hydra/launcher=submitit_local`: processes of this machine, which see the GPUs that this process sees."""

    cluster = "local"

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches(rotated(launch.pending, n_workers(launch)), one_machine=True)

    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> Mapping[int, str]:
        if not self._parameters.get("gpus_per_node"):  # submitit would hide all GPUs
            os.environ[SEEN_GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        try:
            return super().run(batches, plan, display)
        finally:
            os.environ.pop(SEEN_GPUS, None)


def see_gpus() -> None:
    """Let this process see the GPUs that the submitting command saw; to be called before torch is imported."""
    if (seen := os.environ.pop(SEEN_GPUS, None)) is None:
        return
    if seen == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen


def make_private(submitit_folder: Path) -> None:
    """Make the folder of submitit's files, which are pickles, writable by its owner only; leave an existing one as it is.

    Args:
        submitit_folder: made up to the first part with a ``%``.

    Raises:
        InputError: others can write to an existing folder.
    """
    folder = Path(*takewhile(lambda part: "%" not in part, submitit_folder.parts))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.stat()
    if state.st_uid not in (os.getuid(), 0) or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"hydra.launcher.submitit_folder: others can write to {folder}, and jobs run what lies there; "
            f"name a folder that does not exist yet, such as {folder}/mine/%j, or make it private (chmod go-w)"
        )


def _array(job_id: str) -> str:
    """Return the number of the array that a Slurm job belongs to."""
    return job_id.partition("_")[0]
