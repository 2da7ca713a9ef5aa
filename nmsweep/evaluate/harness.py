"""Tasks of the lm-evaluation-harness: it builds the requests and computes the metrics, nmsweep only answers them."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from nmsweep.data.tasks import MINI_TASKS, TaskSource, unreachable
from nmsweep.errors import DataError, NonFiniteError
from nmsweep.evaluate.packing import Request
from nmsweep.evaluate.requests import encoded_pairs, keep_requests, templates_compiled_once, tokenizer_identity
from nmsweep.evaluate.result import Advance, TaskResult
from nmsweep.evaluate.scoring import Budget, score, why_single_rows
from nmsweep.record import Metric

Scoring = Literal["packed", "stock"]


class NMSweepLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model around a model that is loaded already.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        batch_tokens: padded tokens computed at once.
        advance: progress.
        scoring: ``"packed"``, see `scoring`; ``"stock"`` for the harness's own path, whose batch size follows from the
            longest request.
        across_tokens: whether what is pruned of one token depends on other tokens of its sequence (`clact`, a scope in
            percent); then nothing shares a row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int,
        advance: Advance,
        scoring: Scoring = "packed",
        across_tokens: bool = False,
    ) -> None:
        with quiet():  # it warns that arguments are ignored for a model object; none is relied on
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.budget = Budget(batch_tokens)
        self.scoring = scoring
        self.why_single_rows = why_single_rows(model, across_tokens)
        self.n_tokens = 0
        self._show = advance
        self._pairs = encoded_pairs(tokenizer_identity(tokenizer), repr(self.add_bos_token))

    def how(self) -> str:
        """How requests were answered, for the record."""
        if self.scoring == "stock":
            return f"stock, {self.budget}"
        if self.why_single_rows:
            return f"packed, but one continuation a row: {self.why_single_rows}; {self.budget}"
        return f"packed, {self.budget}"

    def advance(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        self._show(n_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._pairs.add([request.args for request in requests], self._encode)
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (context, continuation)
        return self._pairs[pair] if pair in self._pairs else super()._encode_pair(context, continuation)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """`tok_encode` of many texts at once, which the tokenizer does in parallel."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        found: dict[str, list[int]] = {}
        for has_bos in (False, True):
            same = [text for text in texts if text.startswith(bos) == has_bos]
            special = False if has_bos else self.add_bos_token
            options = {} if special is None else {"add_special_tokens": special}
            if same:
                found.update(zip(same, self.tokenizer(same, verbose=False, **options)["input_ids"], strict=True))
        return [found[text] for text in texts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.scoring == "stock":
            longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
            self.batch_size_per_gpu = max(1, self.budget.tokens // min(longest, self.max_length))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[no-any-return]
        answers = score(
            self.model,
            requests,
            max_length=self.max_length,
            budget=self.budget,
            single_rows=self.why_single_rows is not None,
            advance=self.advance,
        )
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.advance(inps.numel())
        return logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness and the data library log and draw bars; a cell has one display of its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
    except BaseException:
        logging.getLogger(__name__).info("%s", said.getvalue())
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_task(source: TaskSource, num_fewshot: int) -> ConfigurableTask:
    """Build the harness's task with its items from where `source` says.

    Raises:
        DataError: the items cannot be had, or few-shot examples would come from the evaluated split.
    """
    assert source.yaml_file is not None
    config = dict(load_yaml(source.yaml_file, resolve_func=True, recursive=True))
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    config |= {"task": source.task, "num_fewshot": num_fewshot}
    if source.files:
        config |= _local_data(source, config, num_fewshot)
    try:
        with quiet():
            task = ConfigurableTask(config=config)
    except (OSError, ConnectionError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        if source.files:
            raise DataError(
                f"task {source.task}: its items in {source.files[source.split]} are not of the task's form: {error!r}"
            ) from error
        raise unreachable(str(source.config.get("dataset_path")), error) from error
    return task


def _local_data(source: TaskSource, config: Mapping[str, Any], num_fewshot: int) -> dict[str, Any]:
    """The changes to a task's YAML that make it read local files: the data set, and the names of the splits there are."""
    files = {split: str(file) for split, file in source.files.items()}
    change: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            change[key] = None
    if num_fewshot and not (config.get("fewshot_config") or {}).get("samples"):
        others = [split for split in files if split != source.split]
        if not others:
            raise DataError(
                f"eval.num_fewshot: {num_fewshot} examples, but {source.task} has only the split that is evaluated "
                f"({source.split}); add another split's file beside {files[source.split]}, or take eval.num_fewshot=0"
            )
        change["fewshot_split"] = change.get("fewshot_split") or others[0]
    return change


_kept_tasks: dict[tuple[str, str, int], ConfigurableTask] = {}  # between the cells of a process


def kept_task(source: TaskSource, num_fewshot: int) -> ConfigurableTask:
    """`load_task`, once for each task, content and number of examples."""
    key = (source.task, source.fingerprint(), num_fewshot)
    if key not in _kept_tasks:
        _kept_tasks[key] = keep_requests(load_task(source, num_fewshot))
    return _kept_tasks[key]


def measure(
    model: Any,
    tokenizer: Any,
    source: TaskSource,
    *,
    limit: int | None,
    num_fewshot: int,
    batch_tokens: int,
    chat_template: bool,
    system_prompt: str | None,
    advance: Advance,
    scoring: Scoring = "packed",
    across_tokens: bool = False,
) -> TaskResult:
    """Run one task of the harness.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        source: the task and its data.
        limit: items at most; None for all.
        num_fewshot: examples before each item.
        batch_tokens: padded tokens computed at once.
        chat_template, system_prompt: as the harness names them.
        advance: progress.
        scoring, across_tokens: as for `NMSweepLM`.

    Raises:
        DataError: its data cannot be had or has another form.
        NonFiniteError: the model gives NaN or infinity.
    """
    task = kept_task(source, num_fewshot)
    lm = NMSweepLM(model, tokenizer, batch_tokens, advance, scoring, across_tokens)
    with quiet(), templates_compiled_once():
        results = harness_evaluate(
            lm,
            {source.task: task},
            limit=limit,
            bootstrap_iters=100,
            log_samples=True,
            system_instruction=system_prompt,
            apply_chat_template=chat_template,
        )
    samples = results["samples"][source.task]
    table = pd.DataFrame([_row(task, sample) for sample in samples])
    _check_finite(source.task, table)
    scores = results["results"][source.task]
    metrics = [
        Metric(source.task, name, float(scores[column]), _stderr(scores, column), len(samples))
        for column in scores
        for name, _, _ in [column.partition(",")]
        if "," in column and "stderr" not in name and isinstance(scores[column], int | float)
    ]
    return TaskResult(sorted(metrics, key=lambda metric: metric.metric), table, lm.n_tokens, lm.how())


def _stderr(scores: Mapping[str, Any], column: str) -> float | None:
    name, _, filtered = column.partition(",")
    value = scores.get(f"{name}_stderr,{filtered}")
    return float(value) if isinstance(value, int | float) else None


def _row(task: ConfigurableTask, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One item as samples.parquet keeps it: enough to compute its metrics again."""
    responses = sample["filtered_resps"]
    row: dict[str, Any] = {"task": task.config.task, "item": int(sample["doc_id"]), "doc_hash": sample["doc_hash"]}
    if all(isinstance(response, tuple | list) and len(response) == 2 for response in responses):
        row["loglikelihoods"] = [float(value) for value, _ in responses]
        row["greedy"] = [bool(flag) for _, flag in responses]
        if task.config.doc_to_choice is not None:
            row["choice_chars"] = [len(choice) for choice in task.doc_to_choice(sample["doc"])]
            row["prediction"] = max(range(len(responses)), key=row["loglikelihoods"].__getitem__)
    else:
        row["response"] = str(responses[0])
    row["gold"] = str(sample["target"])
    return row | {
        f"metric_{name}": float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)
    }


def _check_finite(task: str, table: pd.DataFrame) -> None:
    if "loglikelihoods" not in table:
        return
    for item, values in zip(table["item"], table["loglikelihoods"], strict=True):
        if any(value != value or value in (float("inf"), float("-inf")) for value in values):
            raise NonFiniteError(f"task {task}: a log-likelihood of item {item} is not finite")


def is_mini(task: str) -> bool:
    """Whether a task is of the shipped data, never to be compared with published numbers."""
    return task in MINI_TASKS or task == "mini_prose"
