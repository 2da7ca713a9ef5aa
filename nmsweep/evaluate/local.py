"""A task's items from local files: the harness's YAML with another place to read from, and nothing else changed."""

from collections.abc import Mapping
from typing import Any

from nmsweep.data.examples import fewshot_split, needs_split
from nmsweep.data.tasks import MINI_TASKS, TaskSource


def local_data(source: TaskSource, config: Mapping[str, Any], num_fewshot: int) -> dict[str, Any]:
    """The changes to a task's YAML that make it read local files: the data set, and the names of the splits there are.

    Raises:
        DataError: few-shot examples would come from the evaluated split.
    """
    files = {split: str(file) for split, file in source.files.items()}
    change: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            change[key] = None
    if source.task in MINI_TASKS:  # their YAML is another task's
        change |= {key: source.config[key] for key in ("training_split", "fewshot_config")}
    if needs_split(source, num_fewshot):
        change["fewshot_split"] = fewshot_split(source, num_fewshot)
    return change
