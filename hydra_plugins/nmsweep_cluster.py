"""Hydra's launchers for many processes, tolerant: a job that is lost is one failed job, not the end of the sweep.

What submitit's does without it: a job that is cancelled or dies with its node raises at the first one of them while others
still run, and on a cluster without accounting is waited for without end. And joblib's: every worker imports the libraries
anew while the process that was started does nothing, and one that is killed takes the others with it.
"""

import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from nmsweep.errors import InputError
from nmsweep.results.interrupt import Terminated

try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
except ImportError:  # the extra `cluster` is not installed; choosing the launcher says so
    JoblibLauncher = LocalLauncher = SlurmLauncher = object

log = logging.getLogger(__name__)

POLL_S = float(os.environ.get("NMSWEEP_SQUEUE_POLL_S", "10"))
"""Seconds between two looks at Slurm's queue."""

N_MISSES = 3
"""Looks in a row at which a job without a result is not in the queue before it counts as lost."""


class JobLostError(Exception):
    """A job ended without a result."""


class Queue:
    """Which jobs of an array Slurm still knows as queued, running or completing: `squeue`, which needs no accounting."""

    def __init__(self, array: str) -> None:
        self.array = array
        self.misses: dict[str, int] = {}
        self._looked = 0.0

    def look(self, waiting: Sequence[str]) -> None:
        """Count for each job how many looks in a row it has been missing; a `squeue` that does not answer counts nothing."""
        if time.monotonic() - self._looked < POLL_S:
            return
        self._looked = time.monotonic()
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={self.array}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return
        queued = set(answer.stdout.split())
        for job in waiting:
            self.misses[job] = 0 if job in queued else self.misses.get(job, 0) + 1


class Jobs:
    """All jobs of a launch; the results of those that are lost are failures that say so."""

    def __init__(self, jobs: Sequence[Any], overrides: Sequence[Sequence[str]], slurm: bool) -> None:
        self.jobs, self.overrides = jobs, overrides
        self.queue = Queue(_array(jobs[0])) if slurm else None

    def results(self) -> list[JobReturn]:
        """Wait for every job."""
        waiting = {str(job.job_id): job for job in self.jobs}
        found: dict[str, JobReturn] = {}
        while waiting:
            for name, job in list(waiting.items()):
                if (result := self._result(name, job)) is not None:
                    found[name] = result
                    del waiting[name]
            if self.queue and waiting:
                self.queue.look(list(waiting))
            time.sleep(0.2)
        return [found[str(job.job_id)] for job in self.jobs]

    def _result(self, name: str, job: Any) -> JobReturn | None:
        """What a job gave; None while it has not ended."""
        try:
            if job.paths.result_pickle.exists() or (self.queue is None and job.done()):
                (returned,) = job.results()
                return returned  # type: ignore[no-any-return]
            if self.queue and self.queue.misses.get(name, 0) >= N_MISSES:
                raise JobLostError(f"Slurm job {name} left the queue without a result (its log: {job.paths.stderr})")
        except Exception as error:  # submitit raises a dozen kinds; each means that this job gave nothing
            log.warning("job %s: %s", name, error)
            return _lost(error, self.overrides[self.jobs.index(job)])
        return None


def _lost(error: Exception, overrides: Sequence[str]) -> JobReturn:
    """What a job that ended without a result returns."""
    lost = JobReturn(overrides=list(overrides))
    lost.return_value, lost.status = error, JobStatus.FAILED
    return lost


def _array(job: Any) -> str:
    """The number of the array that a Slurm job is of."""
    return str(job.job_id).partition("_")[0]


class _Tolerant:
    """Launches through submitit's own launcher, which sees stand-ins for its jobs."""

    _EXECUTOR = ""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import submitit

        submitted: list[Any] = []
        stock = submitit.AutoExecutor.map_array

        def map_array(executor: Any, function: Any, *arguments: Any) -> list[Any]:
            submitted.extend(stock(executor, function, *arguments))
            jobs = Jobs(submitted, job_overrides, slurm=self._EXECUTOR == "slurm")
            return [_Given([result]) for result in jobs.results()]

        _private(Path(str(self.params["submitit_folder"])))  # type: ignore[attr-defined]
        submitit.AutoExecutor.map_array = map_array
        try:
            return super().launch(job_overrides, initial_job_idx)  # type: ignore[misc, no-any-return]
        except KeyboardInterrupt as interrupt:
            self._stopped(submitted, interrupt)
            raise
        finally:
            submitit.AutoExecutor.map_array = stock

    def _stopped(self, submitted: Sequence[Any], interrupt: KeyboardInterrupt) -> None:
        """This process was told to stop; jobs of this machine stop with it."""
        for job in submitted:
            job.cancel(check=False)


class _Given:
    """A job whose results are there."""

    def __init__(self, results: list[JobReturn]) -> None:
        self._results = results

    def results(self) -> list[JobReturn]:
        return self._results


def _private(submitit_folder: Path) -> None:
    """See that its owner alone can write to the folder of submitit's files, which are pickles; one that was there stays as it is.

    Args:
        submitit_folder: may have parts such as ``%j`` that submitit fills in for each job.

    Raises:
        InputError: the folder is there and others can write to it.
    """
    named = submitit_folder.parts
    folder = Path(*takewhile(lambda part: "%" not in part, named))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"hydra.launcher.submitit_folder: others can write to {folder}, and jobs run what lies there; "
            f"name a folder that is not there yet, such as {folder}/mine/%j, or take their right away (chmod go-w)"
        )


class SlurmJobs(_Tolerant, SlurmLauncher):  # type: ignore[misc]
    """`hydra/launcher=submitit_slurm`."""

    _EXECUTOR = "slurm"

    def _stopped(self, submitted: Sequence[Any], interrupt: KeyboardInterrupt) -> None:
        """Ctrl-C: the user wants the sweep to stop, wherever it runs. A SIGTERM is for this process: a log-out, a restart."""
        if not isinstance(interrupt, Terminated):
            super()._stopped(submitted, interrupt)
        elif submitted:
            array = _array(submitted[0])
            how = f"`nmsweep status` shows how far they are, `scancel {array}` stops them"
            print(f"nmsweep: terminated; the jobs of array {array} go on: {how}", file=sys.stderr, flush=True)


class LocalJobs(_Tolerant, LocalLauncher):  # type: ignore[misc]
    """`hydra/launcher=submitit_local`; its jobs see the GPUs that this process sees, where submitit would hide them all."""

    _EXECUTOR = "local"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from nmsweep.commands.run import SEEN_GPUS

        if not self.params.get("gpus_per_node"):
            os.environ[SEEN_GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        try:
            return super().launch(job_overrides, initial_job_idx)
        finally:
            os.environ.pop(SEEN_GPUS, None)


class JoblibJobs(JoblibLauncher):  # type: ignore[misc]
    """`hydra/launcher=joblib`: its first job runs in this process, the others in processes beside it."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra_plugins.hydra_joblib_launcher._core import execute_job
        from joblib import wrap_non_picklable_objects

        from nmsweep.sweep.processes import beside

        folder = Path(str(self.config.hydra.sweep.dir))  # once read, the time in it is that of all jobs
        folder.mkdir(parents=True, exist_ok=True)
        shared = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        first, *others = [
            partial(execute_job, number, overrides, *shared)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        with beside([wrap_non_picklable_objects(partial(_job, job)) for job in others]) as processes:
            returned = first()
            if returned.status is JobStatus.FAILED:
                raise returned._return_value
        return [returned, *(_returned(*job, folder) for job in zip(processes, job_overrides[1:], strict=True))]


def _job(job: Callable[[], JobReturn]) -> None:
    """Run a job; where it failed the process says so, and why in its log."""
    returned = job()
    if returned.status is JobStatus.FAILED:
        log.error("job failed", exc_info=returned._return_value)
        sys.exit(1)


def _returned(process: BaseProcess, overrides: Sequence[str], folder: Path) -> JobReturn:
    """What the job of a process that has ended returns."""
    if code := process.exitcode:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code} (its log is in {folder})"
        return _lost(JobLostError(f"worker process {process.pid} {how}; others did its cells"), overrides)
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
