"""Report a group of lm-eval's tasks, such as ``mmlu``, as one task: its items are those of its members, one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr

from nmsweep.data.definitions import as_list
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError
from nmsweep.evaluate.base import TaskResult
from nmsweep.results.record import Metric
from nmsweep.results.samples import WEIGHT_PREFIX


def concatenated(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the members' rows below each other, with their items numbered consecutively."""
    starts = np.cumsum([0, *(len(table) for table in tables)])
    moved = [table.assign(item=table["item"] + start) for table, start in zip(tables, starts[:-1], strict=True)]
    return pd.concat(moved, ignore_index=True)


def pooled(source: TaskSource, results: Sequence[TaskResult]) -> TaskResult:
    """Pool the members' results as lm-eval does.

    Where small members count as much as large ones, the samples have each item's weight in the metric (`WEIGHT_PREFIX`).

    Args:
        source: the group; its `aggregate_metric_list` says which metrics it has and whether large tasks count for more.
        results: of its members, in their order.

    Raises:
        DataError: no member has any of the group's metrics.
    """
    tables = [
        result.samples.assign(task=source.task, subtask=member.task)
        for member, result in zip(source.members, results, strict=True)
    ]
    wanted = as_list(source.config.get("aggregate_metric_list"))
    metrics = []
    for entry in wanted:
        by_size = bool(entry.get("weight_by_size", True))
        for name in _names(str(entry["metric"]), entry.get("filter_list"), results):
            members = [(at, metric) for at, result in enumerate(results) if (metric := _metric(result, name))]
            metrics.append(_pooled(source.task, name, by_size, [metric for _, metric in members]))
            if not by_size:
                for at, _ in members:
                    tables[at][f"{WEIGHT_PREFIX}{name}"] = 1 / (len(members) * len(tables[at]))
    if not metrics:
        names = ", ".join(str(entry["metric"]) for entry in wanted)
        raise DataError(f"task {source.task}: none of its tasks has its metric {names}; name tasks of it instead")
    return TaskResult(metrics, concatenated(tables), sum(result.n_tokens for result in results), results[0].scoring)


def _names(metric: str, filters: Any, results: Sequence[TaskResult]) -> list[str]:
    """Return the members' names of a group's metric: one for each of its filters where members have several."""
    names = {known.metric for result in results for known in result.metrics}
    if filters is None:
        return sorted(name for name in names if name.partition(":")[0] == metric)
    return sorted(names & {metric, *(f"{metric}:{name}" for name in as_list(filters))})


def _metric(result: TaskResult, name: str) -> Metric | None:
    return next((metric for metric in result.metrics if metric.metric == name), None)


def _pooled(task: str, name: str, by_size: bool, metrics: Sequence[Metric]) -> Metric:
    """Pool one metric over the members that have it."""
    sizes = [metric.n_items for metric in metrics]
    value = np.average([metric.value for metric in metrics], weights=sizes if by_size else None)
    errors = [metric.stderr for metric in metrics if metric.stderr is not None]
    stderr = None
    if len(errors) == len(metrics):
        stderr = float(pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors))
    return Metric(task, name, float(value), stderr, sum(sizes))
