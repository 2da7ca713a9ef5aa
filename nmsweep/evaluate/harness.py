"""Tasks of the lm-evaluation-harness: it builds the requests and computes the metrics, nmsweep only answers them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import pandas as pd
from lm_eval.evaluator import evaluate as harness_evaluate

from nmsweep.data.requirements import fewshot_split, needs_split
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import NonFiniteError
from nmsweep.evaluate.groups import joined
from nmsweep.evaluate.kept import KeptTask, Outcome, kept_task
from nmsweep.evaluate.lm import NMSweepLM, Scoring, quiet
from nmsweep.evaluate.prompting import Prompting
from nmsweep.evaluate.requests import templates_compiled_once, tokenizer_identity
from nmsweep.evaluate.result import Advance, TaskResult
from nmsweep.results.record import Metric

_BOOTSTRAP = 100
"""Resamples for the standard error of a metric that is no mean; means have a closed form."""


def measure(
    model: Any,
    tokenizer: Any,
    source: TaskSource,
    *,
    prompting: Prompting,
    batch_tokens: int,
    advance: Advance,
    scoring: Scoring = "packed",
    across_tokens: bool = False,
) -> TaskResult:
    """Run one task of the harness.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        source: the task and its data.
        prompting: how its items become prompts.
        batch_tokens: padded tokens computed at once.
        advance: progress.
        scoring, across_tokens: as for `NMSweepLM`.

    Raises:
        DataError: its data cannot be had or has another form.
        NonFiniteError: the model gives NaN or infinity.
    """
    if source.members:
        measured = [
            measure(
                model, tokenizer, member, prompting=prompting, batch_tokens=batch_tokens, advance=advance,
                scoring=scoring, across_tokens=across_tokens,
            )
            for member in source.members
        ]  # fmt: skip
        return joined(source, measured)
    shots = source.shots(prompting.num_fewshot)
    kept = kept_task(source, shots)
    plans = kept.plans(prompting, tokenizer_identity(tokenizer))
    lm = NMSweepLM(model, tokenizer, batch_tokens, advance, scoring, across_tokens, plans)
    with quiet(), templates_compiled_once(), _in_this_process(), kept.watched() as outcomes:
        results = harness_evaluate(
            lm,
            {source.task: kept.task},
            limit=prompting.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            system_instruction=prompting.system_instruction,
            apply_chat_template=prompting.apply_chat_template,
            fewshot_as_multiturn=prompting.multiturn,
        )
    filters = list(kept.task.instances[0].filtered_resps)
    table = samples_table(kept, outcomes, filters)
    _check_finite(source.task, table)
    metrics = _metrics(source.task, results["results"][source.task], filters, len(table))
    where = f"; {shots} examples from {fewshot_split(source, shots)}" if needs_split(source, shots) else ""
    return TaskResult(metrics, table, lm.n_tokens, lm.how() + where)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """The harness forks a pool for its bootstrap, which a process with a GPU must not do."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _metrics(task: str, scores: Mapping[str, Any], filters: Sequence[str], n_items: int) -> list[Metric]:
    """The harness's numbers; a metric that is computed under several filters has the filter in its name."""
    found = []
    for column, value in scores.items():
        name, _, filtered = column.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = scores.get(f"{name}_stderr,{filtered}")
        error = float(stderr) if isinstance(stderr, Real) else None
        found.append(Metric(task, metric_name(name, filtered, filters), float(value), error, n_items))
    return sorted(found, key=lambda metric: metric.metric)


def metric_name(name: str, filtered: str, filters: Sequence[str]) -> str:
    """``acc``, or ``exact_match:strict-match`` where a task has more than one filter."""
    return name if len(filters) == 1 else f"{name}:{filtered}"


def samples_table(kept: KeptTask, outcomes: Sequence[Outcome], filters: Sequence[str]) -> pd.DataFrame:
    """One row an item, as samples.parquet keeps it: enough to compute its metrics again."""
    raw = {instance.doc_id: instance.resps[0] for instance in kept.task.instances}
    n_items = len(outcomes) // len(filters)
    rows = [_row(kept, outcome, raw[outcome.item]) for outcome in outcomes[:n_items]]
    for at, outcome in enumerate(outcomes):
        row = rows[at % n_items]
        for metric, value in outcome.metrics.items():
            row |= _values(metric_name(metric, filters[at // n_items], filters), value)
    return pd.DataFrame(rows)


def _row(kept: KeptTask, outcome: Outcome, raw: Any) -> dict[str, Any]:
    """What was answered to an item, and what was right."""
    task, answers = kept.task, outcome.filtered
    row: dict[str, Any] = {"task": kept.source.task, "item": outcome.item, "doc_hash": kept.doc_hash(outcome.item)}
    if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        row["loglikelihoods"] = [float(value) for value, _ in answers]
        row["greedy"] = [bool(flag) for _, flag in answers]
        if choices := kept.choices(outcome.item):
            row["choice_chars"] = [len(choice) for choice in choices]
            n_choices = len(row["choice_chars"])
            row["prediction"] = max(range(n_choices), key=row["loglikelihoods"].__getitem__)
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        row["loglikelihoods"] = [float(value) for value in answers]
    else:
        row["response"] = str(raw)
    row["gold"] = kept.gold(outcome.item)
    return row


def _values(name: str, value: Any) -> dict[str, Any]:
    """One item's value of a metric: a number, or the numbers from which the metric is made."""
    if isinstance(value, Real):
        return {f"metric_{name}": float(value)}
    if isinstance(value, list | tuple) and all(isinstance(number, Real) for number in value):
        return {f"values_{name}": [float(number) for number in value]}
    return {}


def _check_finite(task: str, table: pd.DataFrame) -> None:
    if "loglikelihoods" not in table:
        return
    for item, values in zip(table["item"], table["loglikelihoods"], strict=True):
        if any(value != value or value in (float("inf"), float("-inf")) for value in values):
            raise NonFiniteError(f"task {task}: a log-likelihood of item {item} is not finite")
