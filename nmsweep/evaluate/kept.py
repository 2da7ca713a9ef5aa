"""Tasks of the harness, built once for all cells of a process."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string

from nmsweep.data.hub import unreachable
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError
from nmsweep.evaluate.lm import Plans, quiet
from nmsweep.evaluate.local import examples_elsewhere, local_data
from nmsweep.evaluate.requests import keep_requests


class Outcome(NamedTuple):
    """What the harness made of the answers to one item under one filter."""

    item: int
    filtered: Sequence[Any]
    metrics: dict[str, Any]


class KeptTask:
    """One task with its items in memory; everything about an item that no model changes is worked out once.

    The harness renders each item's templates again for every cell, and hashes its text; with the requests answered in
    seconds, that is most of a cell.

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
        self._plans: dict[object, Plans] = {}
        self.task.doc_iterator = self._doc_iterator
        self.task.doc_to_text = self._once(self.task.doc_to_text)
        self.task.doc_to_target = self._once(self.task.doc_to_target)
        self.task.doc_to_choice = self._once(self.task.doc_to_choice)
        keep_requests(self.task, source)

    def plans(self, *how: object) -> Plans:
        """Where packed rows are kept for one way of building the requests."""
        return self._plans.setdefault(how, {})

    def doc_hash(self, item: int) -> str:
        """The harness's own hash of an item."""
        if item not in self._hashes:
            text = json.dumps(self.docs[item], indent=2, default=handle_non_serializable, ensure_ascii=False)
            self._hashes[item] = hash_string(text)
        return self._hashes[item]

    def gold(self, item: int) -> str:
        """The right choice's index, or the right answer where the task has no choices."""
        task, doc = self.task, self.docs[item]
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = self.choices(item)
        return str(choices.index(target) if isinstance(target, str) and target in choices else target)

    def choices(self, item: int) -> list[str]:
        """What is chosen from; empty where the task has no choices."""
        return list(self.task.doc_to_choice(self.docs[item])) if self.task.config.doc_to_choice is not None else []

    def text(self, item: int) -> str:
        """What is asked, without examples; where the choices are contexts, what follows each of them."""
        task, doc = self.task, self.docs[item]
        return str(task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc))

    @contextmanager
    def watched(self) -> Iterator[list[Outcome]]:
        """What the harness makes of each item's answers inside the block, filter by filter."""
        found: list[Outcome] = []
        inner = self.task.process_results

        def process_results(doc: Any, results: Any) -> Any:
            metrics = inner(doc, results)
            found.append(Outcome(self._index[id(doc)], results, metrics))
            return metrics

        self.task.process_results = process_results
        try:
            yield found
        finally:
            del self.task.process_results

    def _doc_iterator(
        self, *, rank: int = 0, limit: float | None = None, world_size: int = 1, samples: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """The harness's own, over items that stay in memory."""
        for item, doc in islice(enumerate(self.docs), rank, int(limit) if limit else None, world_size):
            if self.source.files:
                self._check(item)
            yield item, doc

    def _check(self, item: int) -> None:
        """The harness takes an item without a right choice for one that every model gets wrong; here it is an error."""
        try:
            choices = self.choices(item)
            target = self.task.doc_to_text(self.docs[item]) if self.task.multiple_input else self.task.doc_to_target(self.docs[item])  # fmt: skip
        except Exception as error:  # the task's templates and code over items of others raise anything
            raise _malformed(self.source, f"item {item}: {type(error).__name__}: {error}") from error
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return
        right = target if isinstance(target, list | tuple) else [target]
        if not right or not all(one in (range(len(choices)) if isinstance(one, int) else choices) for one in right):
            raise _malformed(self.source, f"item {item}: {str(target)[:60]!r} is none of its {len(choices)} choices")

    def _once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of an item, called once for each; other items (few-shot examples) pass through."""
        known: dict[int, Any] = {}

        def call(doc: Any, *args: Any, **kwargs: Any) -> Any:
            index = self._index.get(id(doc))
            if index is None or args or kwargs:
                return function(doc, *args, **kwargs)
            if index not in known:
                known[index] = function(doc)
            return known[index]

        return call


def load_task(source: TaskSource, num_fewshot: int) -> ConfigurableTask:
    """Build the harness's task with its items from where `source` says.

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
            config |= local_data(source, config)
        config |= examples_elsewhere(source, config, num_fewshot)
        with quiet():
            task = ConfigurableTask(config=config)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"task {source.task}: its code needs {error.name or error}; install it: pip install {error.name}"
        ) from error
    except _OF_THE_HUB as error:
        if source.files:
            raise _malformed(source, error) from error
        raise unreachable(str(source.config.get("dataset_path")), error) from error
    except Exception as error:  # the task's templates and code over items of others raise anything
        if source.files:
            raise _malformed(source, error) from error
        raise
    return task


_OF_THE_HUB = (OSError, ConnectionError, ValueError, KeyError, datasets.exceptions.DatasetsError)


def _malformed(source: TaskSource, why: object) -> DataError:
    return DataError(
        f"task {source.task}: its items in {source.files[source.split]} are not of the task's form: {why!r}"
    )


_kept: dict[tuple[str, str, str, int], KeptTask] = {}  # between the cells of a process


def kept_task(source: TaskSource, num_fewshot: int) -> KeptTask:
    """`KeptTask`, once for each task, definition, content and number of examples."""
    key = (source.task, source.definition(), source.content(), num_fewshot)
    if key not in _kept:
        _kept[key] = KeptTask(source, num_fewshot)
    return _kept[key]
