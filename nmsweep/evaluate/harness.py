"""Measure a task of the lm-evaluation-harness: lm-eval builds the requests and computes the metrics, nmsweep answers.

The way of one task: `task` builds its requests, `lm` encodes them, `packed` scores them, `logits` reads the model.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd
from lm_eval.evaluator import evaluate as harness_evaluate

from nmsweep.config.schema import EvalConfig
from nmsweep.data.requirements import fewshot_split, needs_split
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import NonFiniteError
from nmsweep.evaluate.base import TaskResult
from nmsweep.evaluate.groups import pooled
from nmsweep.evaluate.lm import NMSweepLM
from nmsweep.evaluate.running import running_lm_eval
from nmsweep.evaluate.task import HarnessTask, Outcome, harness_task
from nmsweep.results.record import Metric

_BOOTSTRAP = 100
"""Resamples for the standard error of a metric that is not a mean; means have a closed form."""


def measure(
    model: Any,
    tokenizer: Any,
    source: TaskSource,
    settings: EvalConfig,
    across_tokens: bool = False,
) -> TaskResult:
    """Measure one task, or a group of tasks that is reported as one.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        source: the task and its data.
        settings: how its items become prompts, and how requests are answered.
        across_tokens: as for `NMSweepLM`.

    Raises:
        DataError: its data cannot be had or is malformed.
        NonFiniteError: the model returns NaN or infinity.
    """
    if source.members:
        members = [measure(model, tokenizer, leaf, settings, across_tokens) for leaf in source.members]
        return pooled(source, members)
    shots = source.shots(settings.num_fewshot)
    task = harness_task(source, shots)
    prepared = task.prepared(settings, tokenizer)
    lm = NMSweepLM(model, tokenizer, settings.batch_tokens, settings.scoring, across_tokens, prepared)
    with running_lm_eval(), task.evaluated(prepared) as outcomes:
        scores = harness_evaluate(
            lm,
            {source.task: task.task},
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.multiturn,
        )["results"][source.task]
    filters = list(task.task.instances[0].filtered_resps)
    table = samples_table(task, outcomes, filters)
    _check_finite(source.task, table)
    examples = f"; {shots} examples from {fewshot_split(source, shots)}" if needs_split(source, shots) else ""
    return TaskResult(_metrics(source.task, scores, filters, len(table)), table, lm.n_tokens, lm.how() + examples)


def _metrics(task: str, scores: Mapping[str, Any], filters: Sequence[str], n_items: int) -> list[Metric]:
    """Return lm-eval's numbers, by name."""
    metrics = []
    for column, value in scores.items():
        name, _, filter_name = column.partition(",")
        if not filter_name or name.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = scores.get(f"{name}_stderr,{filter_name}")
        error = float(stderr) if isinstance(stderr, Real) else None
        metrics.append(Metric(task, metric_name(name, filter_name, filters), float(value), error, n_items))
    return sorted(metrics, key=lambda metric: metric.metric)


def metric_name(name: str, filter_name: str, filters: Sequence[str]) -> str:
    """Return ``acc``, or ``exact_match:strict-match`` where a task has more than one filter."""
    return name if len(filters) == 1 else f"{name}:{filter_name}"


def samples_table(task: HarnessTask, outcomes: Sequence[Outcome], filters: Sequence[str]) -> pd.DataFrame:
    """Return the rows of samples.parquet, one an item: enough to recompute its metrics."""
    raw = {instance.doc_id: instance.resps[0] for instance in task.task.instances}
    n_items = len(outcomes) // len(filters)
    rows = [_row(task, outcome, raw[outcome.item]) for outcome in outcomes[:n_items]]
    for at, outcome in enumerate(outcomes):
        row = rows[at % n_items]
        for metric, value in outcome.metrics.items():
            row |= _values(metric_name(metric, filters[at // n_items], filters), value)
    return pd.DataFrame(rows)


def _row(task: HarnessTask, outcome: Outcome, raw: Any) -> dict[str, Any]:
    """Return the answers to an item, and the right one."""
    kind, answers = task.task.OUTPUT_TYPE, outcome.filtered
    row: dict[str, Any] = {"task": task.source.task, "item": outcome.item, "doc_hash": task.doc_hash(outcome.item)}
    if kind in ("multiple_choice", "loglikelihood"):
        row["loglikelihoods"] = [float(value) for value, _ in answers]
        row["greedy"] = [bool(flag) for _, flag in answers]
        if choices := task.choices(outcome.item):
            row["choice_chars"] = [len(choice) for choice in choices]
            row["prediction"] = max(range(len(choices)), key=row["loglikelihoods"].__getitem__)
    elif kind == "loglikelihood_rolling":
        row["loglikelihoods"] = [float(value) for value in answers]
    else:
        row["response"] = str(raw)
    row["gold"] = task.gold(outcome.item)
    return row


def _values(name: str, value: Any) -> dict[str, Any]:
    """Return an item's value of a metric: a number, or the numbers from which the metric is computed."""
    if isinstance(value, Real):
        return {f"metric_{name}": float(value)}
    if isinstance(value, list | tuple) and all(isinstance(number, Real) for number in value):
        return {f"values_{name}": [float(number) for number in value]}
    return {}


def _check_finite(task: str, table: pd.DataFrame) -> None:
    if "loglikelihoods" not in table:
        return
    for item, values in zip(table["item"], table["loglikelihoods"], strict=True):
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(f"task {task}: a log-likelihood of item {item} is not finite")
