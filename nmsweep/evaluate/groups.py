"""A group of the harness's tasks, such as ``mmlu``, as one task: its items are those of its members, one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr

from nmsweep.data.definitions import as_list
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError
from nmsweep.evaluate.result import TaskResult
from nmsweep.results.record import Metric
from nmsweep.statistics.comparison import WEIGHT_PREFIX


def numbered(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The members' rows below each other, their items numbered on."""
    starts = np.cumsum([0, *(len(table) for table in tables)])
    moved = [table.assign(item=table["item"] + start) for table, start in zip(tables, starts[:-1], strict=True)]
    return pd.concat(moved, ignore_index=True)


def joined(source: TaskSource, measured: Sequence[TaskResult]) -> TaskResult:
    """The members' results as the group's.

    Where small members count as much as large ones, the samples have each item's weight in the metric (`WEIGHT_PREFIX`).

    Args:
        source: the group; its `aggregate_metric_list` says which metrics it has and whether large tasks count for more.
        measured: of its members, in their order.

    Raises:
        DataError: no member has any of the group's metrics.
    """
    tables = [
        result.samples.assign(task=source.task, subtask=member.task)
        for member, result in zip(source.members, measured, strict=True)
    ]
    metrics = []
    for wanted in as_list(source.config.get("aggregate_metric_list")):
        by_size = bool(wanted.get("weight_by_size", True))
        for name in _names(str(wanted["metric"]), wanted.get("filter_list"), measured):
            have = [at for at, result in enumerate(measured) if _metric(result, name)]
            metrics.append(_pooled(source.task, name, by_size, [measured[at] for at in have]))
            if not by_size:
                for at in have:
                    tables[at][f"{WEIGHT_PREFIX}{name}"] = 1 / (len(have) * len(tables[at]))
    if not metrics:
        asked = ", ".join(str(wanted["metric"]) for wanted in as_list(source.config.get("aggregate_metric_list")))
        raise DataError(f"task {source.task}: none of its tasks has its metric {asked}; name tasks of it instead")
    return TaskResult(metrics, numbered(tables), sum(result.n_tokens for result in measured), measured[0].scoring)


def _names(metric: str, filters: Any, measured: Sequence[TaskResult]) -> list[str]:
    """The members' names of a group's metric: one for each of its filters where members have several."""
    wanted = None if filters is None else {metric, *(f"{metric}:{name}" for name in as_list(filters))}
    there = {one.metric for result in measured for one in result.metrics}
    return sorted(
        name for name in there if (name in wanted if wanted is not None else name.partition(":")[0] == metric)
    )


def _metric(result: TaskResult, name: str) -> Metric | None:
    return next((metric for metric in result.metrics if metric.metric == name), None)


def _pooled(task: str, name: str, by_size: bool, measured: Sequence[TaskResult]) -> Metric:
    """One metric over the members that have it, as the harness pools it."""
    found = [metric for result in measured if (metric := _metric(result, name))]
    sizes = [metric.n_items for metric in found]
    value = np.average([metric.value for metric in found], weights=sizes if by_size else None)
    errors = [metric.stderr for metric in found if metric.stderr is not None]
    stderr = None
    if len(errors) == len(found):
        stderr = float(pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors))
    return Metric(task, name, float(value), stderr, sum(sizes))
