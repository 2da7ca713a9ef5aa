"""Submitit's launchers, tolerant: a job that is lost is one failed job, not the end of the sweep.

What the stock launcher does without it: a job that is cancelled or dies with its node raises at the first one of them while
others still run, and on a cluster without accounting is waited for without end.
"""

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
except ImportError:  # the extra `cluster` is not installed; choosing the launcher says so
    LocalLauncher = SlurmLauncher = object

log = logging.getLogger(__name__)

POLL_S = float(os.environ.get("NMSWEEP_SQUEUE_POLL_S", "10"))
"""Seconds between two looks at Slurm's queue."""

N_MISSES = 3
"""Looks in a row at which a job without a result is not in the queue before it counts as lost."""


class JobLostError(Exception):
    """A job left the queue without a result."""


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
        self.queue = Queue(str(jobs[0].job_id).partition("_")[0]) if slurm else None

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
            lost = JobReturn(overrides=list(self.overrides[self.jobs.index(job)]))
            lost.return_value, lost.status = error, JobStatus.FAILED
            return lost
        return None


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

        _private(Path(str(self.params["submitit_folder"])).parent)  # type: ignore[attr-defined]
        submitit.AutoExecutor.map_array = map_array
        try:
            return super().launch(job_overrides, initial_job_idx)  # type: ignore[misc, no-any-return]
        except BaseException:  # Ctrl-C: the user wants the sweep to stop, wherever it runs
            for job in submitted:
                job.cancel(check=False)
            raise
        finally:
            submitit.AutoExecutor.map_array = stock


class _Given:
    """A job whose results are there."""

    def __init__(self, results: list[JobReturn]) -> None:
        self._results = results

    def results(self) -> list[JobReturn]:
        return self._results


def _private(folder: Path) -> None:
    """Make a folder that its owner alone can write: submitit's files in it are pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


class SlurmJobs(_Tolerant, SlurmLauncher):  # type: ignore[misc]
    """`hydra/launcher=submitit_slurm`."""

    _EXECUTOR = "slurm"


class LocalJobs(_Tolerant, LocalLauncher):  # type: ignore[misc]
    """`hydra/launcher=submitit_local`."""

    _EXECUTOR = "local"
