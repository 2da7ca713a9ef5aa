"""A group of the harness's tasks, such as ``mmlu``, as one task: its items are those of its members, one after the other."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from lm_eval.api.metrics import pooled_sample_stderr

from nmsweep.data.tasks import TaskSource
from nmsweep.evaluate.result import TaskResult
from nmsweep.record import Metric


def numbered(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The members' rows below each other, their items numbered on."""
    starts = np.cumsum([0, *(len(table) for table in tables)])
    moved = [table.assign(item=table["item"] + start) for table, start in zip(tables, starts[:-1], strict=True)]
    return pd.concat(moved, ignore_index=True)


def joined(source: TaskSource, measured: Sequence[TaskResult]) -> TaskResult:
    """The members' results as the group's.

    Args:
        source: the group; its `aggregate_metric_list` says which metrics it has and whether large tasks count for more.
        measured: of its members, in their order.
    """
    samples = numbered(
        [
            result.samples.assign(task=source.task, subtask=member.task)
            for member, result in zip(source.members, measured, strict=True)
        ]
    )
    metrics = [
        metric
        for wanted in source.config.get("aggregate_metric_list") or []
        if (metric := _pooled(source.task, str(wanted["metric"]), bool(wanted.get("weight_by_size", True)), measured))
    ]
    return TaskResult(metrics, samples, sum(result.n_tokens for result in measured), measured[0].scoring)


def _pooled(task: str, name: str, weight_by_size: bool, measured: Sequence[TaskResult]) -> Metric | None:
    """One metric over the members that have it, as the harness pools it."""
    found = [metric for result in measured for metric in result.metrics if metric.metric == name]
    if not found:
        return None
    sizes = [metric.n_items for metric in found]
    value = np.average([metric.value for metric in found], weights=sizes if weight_by_size else None)
    errors = [metric.stderr for metric in found if metric.stderr is not None]
    stderr = float(pooled_sample_stderr(errors, sizes)) if weight_by_size and len(errors) == len(found) else None
    return Metric(task, name, float(value), stderr, sum(sizes))
