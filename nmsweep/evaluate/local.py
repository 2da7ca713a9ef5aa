"""A task's items from local files, and its examples from a split of their own: what is changed of the harness's YAML."""

from collections.abc import Mapping
from typing import Any

from nmsweep.data.requirements import fewshot_split, needs_split
from nmsweep.data.tasks import MINI_TASKS, TaskSource


def local_data(source: TaskSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """The changes to a task's YAML that make it read local files: the data set, and the names of the splits there are."""
    files = {split: str(file) for split, file in source.files.items()}
    change: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            change[key] = None
    if source.task in MINI_TASKS:  # their YAML is another task's
        change |= {key: source.config[key] for key in ("training_split", "fewshot_config")}
    return change


def examples_elsewhere(source: TaskSource, config: Mapping[str, Any], num_fewshot: int) -> dict[str, Any]:
    """The changes to a task's YAML that make it take examples from a split that is not evaluated.

    Raises:
        DataError: there is none.
    """
    if not needs_split(source, num_fewshot):
        return {}
    split = fewshot_split(source, num_fewshot)
    change: dict[str, Any] = {"fewshot_split": split}
    if (own := config.get("fewshot_config") or {}).get("split"):
        change["fewshot_config"] = {**own, "split": split}
    return change
