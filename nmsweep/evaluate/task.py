"""A task of lm-eval with its items in memory, built once for all cells of a process."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string

from nmsweep.config.schema import EvalConfig
from nmsweep.data.hub import unreachable
from nmsweep.data.requirements import fewshot_split, needs_split
from nmsweep.data.tasks import MINI_TASKS, TaskSource
from nmsweep.errors import DataError
from nmsweep.evaluate.lm import Prepared
from nmsweep.evaluate.running import quiet

FEWSHOT_SEED = 1234
"""Seed with which few-shot examples are drawn: lm-eval's own."""


class Outcome(NamedTuple):
    """The answers to one item after one filter, and their metrics."""

    item: int
    filtered: Sequence[Any]
    metrics: dict[str, Any]


class HarnessTask:
    """One task of lm-eval, and everything about its items that does not depend on a model.

    lm-eval renders the templates of every item again for each cell, which would take longer than scoring a small model.

    Args:
        source: the task and its data.
        num_fewshot: examples before each item.

    Raises:
        DataError: the items cannot be had, or few-shot examples would come from the evaluated split.
    """

    def __init__(self, source: TaskSource, num_fewshot: int) -> None:
        self.source = source
        self.task = load_task(source, num_fewshot)
        self.docs: list[dict[str, Any]] = [dict(doc) for doc in self.task.eval_docs]
        self._index = {id(doc): index for index, doc in enumerate(self.docs)}
        self._hashes: dict[int, str] = {}
        self._prepared: dict[tuple[EvalConfig, str], Prepared] = {}
        self.task.doc_iterator = self._doc_iterator
        self.task.doc_to_text = self._once(self.task.doc_to_text)
        self.task.doc_to_target = self._once(self.task.doc_to_target)
        self.task.doc_to_choice = self._once(self.task.doc_to_choice)

    def prepared(self, settings: EvalConfig, tokenizer: Any) -> Prepared:
        """Return the requests kept for some settings and a tokenizer; empty the first time."""
        return self._prepared.setdefault((settings, tokenizer_identity(tokenizer)), Prepared())

    def build(self, prepared: Prepared, **options: Any) -> list[Instance]:
        """Build the requests, or take those in `prepared` and remove their answers.

        lm-eval's evaluator would build them again at every call, and with other few-shot examples, because the random
        state of the task moves on.

        Args:
            prepared: keeps the requests.
            options: of lm-eval's `build_all_requests`.
        """
        if not prepared.instances:
            self.task.set_fewshot_seed(FEWSHOT_SEED)
            type(self.task).build_all_requests(self.task, **options)
            prepared.instances = self.task.instances
        for instance in prepared.instances:
            instance.resps = []
            instance.filtered_resps = {}
        self.task._instances = prepared.instances
        return prepared.instances

    @contextmanager
    def evaluated(self, prepared: Prepared) -> Iterator[list[Outcome]]:
        """Let lm-eval evaluate the prepared requests inside the block.

        Yields:
            The outcome of each item, filter by filter, as lm-eval computes it.
        """
        outcomes: list[Outcome] = []
        inner = self.task.process_results

        def process_results(doc: Any, results: Any) -> Any:
            metrics = inner(doc, results)
            outcomes.append(Outcome(self._index[id(doc)], results, metrics))
            return metrics

        self.task.build_all_requests = partial(self.build, prepared)
        self.task.process_results = process_results
        try:
            yield outcomes
        finally:
            del self.task.build_all_requests, self.task.process_results

    def doc_hash(self, item: int) -> str:
        """Return lm-eval's own hash of an item."""
        if item not in self._hashes:
            text = json.dumps(self.docs[item], indent=2, default=handle_non_serializable, ensure_ascii=False)
            self._hashes[item] = hash_string(text)
        return self._hashes[item]

    def gold(self, item: int) -> str:
        """Return the index of the right choice, or the right answer where the task has no choices."""
        target, choices = self._target(item), self.choices(item)
        return str(choices.index(target) if isinstance(target, str) and target in choices else target)

    def choices(self, item: int) -> list[str]:
        """Return an item's choices; none where the task has no choices."""
        return list(self.task.doc_to_choice(self.docs[item])) if self.task.config.doc_to_choice is not None else []

    def text(self, item: int) -> str:
        """Return an item's question without examples; where the choices are contexts, the text that follows each of them."""
        task, doc = self.task, self.docs[item]
        return str(task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc))

    def _target(self, item: int) -> Any:
        task, doc = self.task, self.docs[item]
        return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)

    def _doc_iterator(
        self, *, rank: int = 0, limit: float | None = None, world_size: int = 1, samples: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Replace lm-eval's iterator by one over the items in memory."""
        for item, doc in islice(enumerate(self.docs), rank, int(limit) if limit else None, world_size):
            if self.source.files:
                self._check(item)
            yield item, doc

    def _check(self, item: int) -> None:
        """Refuse an item without a right choice, which lm-eval would count as wrong for every model."""
        try:
            choices, target = self.choices(item), self._target(item)
        except Exception as error:  # the templates and code of a task may raise anything on malformed items
            raise _malformed(self.source, f"item {item}: {type(error).__name__}: {error}") from error
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return
        right = target if isinstance(target, list | tuple) else [target]
        if not right or not all(
            answer in (range(len(choices)) if isinstance(answer, int) else choices) for answer in right
        ):
            raise _malformed(self.source, f"item {item}: {str(target)[:60]!r} is none of its {len(choices)} choices")

    def _once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Call a function of an item once for each item; pass other documents (few-shot examples) through."""
        known: dict[int, Any] = {}

        def call(doc: Any, *args: Any, **kwargs: Any) -> Any:
            index = self._index.get(id(doc))
            if index is None or args or kwargs:
                return function(doc, *args, **kwargs)
            if index not in known:
                known[index] = function(doc)
            return known[index]

        return call


_tasks: dict[tuple[str, str, str, int], HarnessTask] = {}  # shared by the cells of a process


def harness_task(source: TaskSource, num_fewshot: int) -> HarnessTask:
    """Return the `HarnessTask` of a task, definition, content and number of examples; one for each in a process."""
    key = (source.task, source.definition(), source.content(), num_fewshot)
    if key not in _tasks:
        _tasks[key] = HarnessTask(source, num_fewshot)
    return _tasks[key]


@lru_cache(maxsize=1)
def tokenizer_identity(tokenizer: Any) -> str:
    """Return the sha256 of everything that decides how a tokenizer turns text or a chat into token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    options = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")]
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    return hashlib.sha256(repr([vocabulary, options, special]).encode()).hexdigest()


def load_task(source: TaskSource, num_fewshot: int) -> ConfigurableTask:
    """Build lm-eval's task, its items read from where `source` says.

    Raises:
        DataError: the items cannot be had, or few-shot examples would come from the evaluated split.
    """
    assert source.yaml_file is not None
    try:
        config = dict(load_yaml(source.yaml_file, resolve_func=True, recursive=True))
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        config |= {"task": source.task, "num_fewshot": num_fewshot}
        if source.files:
            config |= _local_data(source, config)
        config |= _other_examples(source, config, num_fewshot)
        with quiet():
            task = ConfigurableTask(config=config)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"task {source.task}: its code needs {error.name or error}; install it: pip install {error.name}"
        ) from error
    except Exception as error:  # the templates and code of a task may raise anything on malformed items
        if source.files:
            raise _malformed(source, error) from error
        if isinstance(error, (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError)):
            raise unreachable(str(source.config.get("dataset_path")), error) from error
        raise
    return task


def _local_data(source: TaskSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes to a task's YAML that make it read local files."""
    files = {split: str(file) for split, file in source.files.items()}
    change: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            change[key] = None
    if source.task in MINI_TASKS:  # their YAML is that of another task
        change |= {key: source.config[key] for key in ("training_split", "fewshot_config")}
    return change


def _other_examples(source: TaskSource, config: Mapping[str, Any], num_fewshot: int) -> dict[str, Any]:
    """Return the changes to a task's YAML that make it take examples from a split that is not evaluated.

    Raises:
        DataError: there is no such split.
    """
    if not needs_split(source, num_fewshot):
        return {}
    split = fewshot_split(source, num_fewshot)
    change: dict[str, Any] = {"fewshot_split": split}
    if (fewshot_config := config.get("fewshot_config") or {}).get("split"):
        change["fewshot_config"] = {**fewshot_config, "split": split}
    return change


def _malformed(source: TaskSource, reason: object) -> DataError:
    return DataError(
        f"task {source.task}: its items in {source.files[source.split]} are not of the task's form: {reason!r}"
    )
