"""Ray tasks. Ray is optional: `pip install 'ray>=2.60'`."""

from collections.abc import Mapping, Sequence
from typing import Any

from nmsweep.errors import InputError
from nmsweep.progress import Display
from nmsweep.sweep.executors.base import Executor, Launch, by_model
from nmsweep.sweep.plan import Batch, Plan


class RayTasks(Executor):
    """`hydra/launcher=ray`: a task for each batch, with cells of one model.

    Args:
        ray: `init`, the arguments of ``ray.init``, and `remote`, the options of each task; null means Ray's default.
    """

    def __init__(self, ray: Mapping[str, Mapping[str, Any]]) -> None:
        if unknown := set(ray) - {"init", "remote"}:
            raise InputError(f"hydra.launcher.ray.{min(unknown)}: is no key of RayTasks; allowed: init, remote")
        self._init, self._remote = (
            {key: value for key, value in (ray.get(part) or {}).items() if value is not None}
            for part in ("init", "remote")
        )

    def check(self) -> None:
        self._task()

    def _task(self) -> Any:
        """Return the remote function, Ray not yet started."""
        try:
            import ray
        except ImportError as error:
            raise InputError("hydra/launcher=ray: Ray is not installed; pip install 'ray>=2.60'") from error
        try:
            return ray.remote(max_retries=0, **self._remote)(_work)
        except (ValueError, TypeError, AssertionError) as error:
            raise InputError(f"hydra.launcher.ray.remote: Ray refuses: {' '.join(str(error).split())}") from error

    def share(self, launch: Launch) -> list[Batch]:
        return launch.batches(by_model(launch))

    def run(self, batches: Sequence[Batch], plan: Plan, display: Display) -> Mapping[int, str]:
        import ray

        lost: dict[int, str] = {}
        try:
            ray.init(**{"log_to_driver": False, "logging_level": "ERROR", **self._init})
        except (RuntimeError, ValueError, TypeError, ConnectionError) as error:
            raise InputError(f"hydra.launcher.ray.init: Ray refuses: {' '.join(str(error).split())}") from error
        try:
            task = self._task()
            for reference, batch in [(task.remote(batch), batch) for batch in batches]:
                try:
                    ray.get(reference)
                except Exception as error:  # a worker that died, or what the task raised
                    reason = str(error).strip().splitlines()[-1]
                    lost.update(dict.fromkeys(batch.indices, f"{type(error).__name__}: {reason}"))
        finally:
            ray.shutdown()
        return lost


def _work(batch: Batch) -> None:
    from nmsweep.sweep.work import run_batch

    run_batch(batch, Display(quiet=True))
