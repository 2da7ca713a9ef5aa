"""Send finished cells to Weights & Biases and MLflow: one run per cell, grouped by sweep. Off by default.

A logger cannot fail a cell: it runs after the record is written, in its own thread and for a limited time, and its errors
are reported on one line.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from nmsweep.config.schema import RunConfig
from nmsweep.results.layout import RUNS
from nmsweep.results.record import CellRecord

TIMEOUT_S = 60.0
"""Longest time in seconds that a logger may take for one cell."""

log = logging.getLogger(__name__)

Logger = Callable[[RunConfig, CellRecord, str], None]


def log_cell(cfg: RunConfig, record: CellRecord, sweep: str, say: Callable[[str], None]) -> None:
    """Send a finished cell to the enabled loggers.

    Args:
        cfg: config of the cell.
        record: its record.
        sweep: id of its plan, the group of the run.
        say: called with the reason if a logger fails.
    """
    for name, send in LOGGERS.items():
        if getattr(cfg.loggers, name).enabled and (problem := _in_time(send, cfg, record, sweep)):
            log.warning("logger %s: %s", name, problem)
            say(f"    {name} was not told ({problem}); the record is complete")


def _in_time(send: Logger, cfg: RunConfig, record: CellRecord, sweep: str) -> str:
    """Run a logger and return its error; empty if it succeeds."""
    problems = [f"no answer in {TIMEOUT_S:.0f} s"]

    def run() -> None:
        try:
            send(cfg, record, sweep)
            problems.clear()
        except BaseException as error:  # the cell is finished: no error of a logger may fail it
            problems[0] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    thread = threading.Thread(target=run, daemon=True, name="logger")
    thread.start()
    thread.join(TIMEOUT_S)
    return "; ".join(problems)


def metrics_of(record: CellRecord) -> dict[str, float]:
    """Return the cell's numbers by ``task/metric``, with its time and tokens."""
    names = record.metrics["task"] + "/" + record.metrics["metric"]
    numbers = dict(zip(names, record.metrics["value"].astype(float), strict=True))
    return {**numbers, "time_s": float(record.provenance["time_s"]), "tokens": float(record.provenance["tokens"])}


def params_of(cfg: RunConfig) -> dict[str, str]:
    """Return the config values that distinguish cells."""
    keys = ("pattern", "mitigation", "targets", "scope", "profile", "tasks", "dtype", "seed")
    dump: Mapping[str, Any] = cfg.dump()
    names = {"model": cfg.model_name, "criterion": cfg.criterion_name}
    return {key: str(value) for key, value in ({key: dump[key] for key in keys} | names).items()}


def _to_mlflow(cfg: RunConfig, record: CellRecord, sweep: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=cfg.loggers.mlflow.tracking_uri)
    name = cfg.loggers.mlflow.experiment
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    tags = {"sweep": sweep, "cell_id": record.cell_id}
    run = client.create_run(experiment_id, run_name=record.folder.name, tags=tags)
    for key, value in params_of(cfg).items():
        client.log_param(run.info.run_id, key, value)
    for key, number in metrics_of(record).items():
        client.log_metric(run.info.run_id, key, number)
    client.set_terminated(run.info.run_id)


def _to_wandb(cfg: RunConfig, record: CellRecord, sweep: str) -> None:
    import wandb

    chosen = cfg.loggers.wandb
    run = wandb.init(
        project=chosen.project, entity=chosen.entity, mode=chosen.mode, group=sweep, name=record.folder.name,
        config=params_of(cfg), reinit="create_new", dir=str(cfg.results_dir / RUNS),
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    run.log(metrics_of(record))
    run.finish()


LOGGERS: dict[str, Logger] = {"wandb": _to_wandb, "mlflow": _to_mlflow}
