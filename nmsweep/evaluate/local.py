"""A task's items from local files: the harness's YAML with another place to read from, and nothing else changed."""

from collections.abc import Mapping
from typing import Any

from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError


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
    if num_fewshot and not (config.get("fewshot_config") or {}).get("samples"):
        change["fewshot_split"] = fewshot_split(source, config, num_fewshot)
    return change


def fewshot_split(source: TaskSource, config: Mapping[str, Any], num_fewshot: int) -> str:
    """The split that examples are taken from: the one that the harness would take, if its file is there.

    Raises:
        DataError: there is no file but the evaluated split's.
    """
    wanted = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    others = [str(split) for split in wanted if split in source.files and split != source.split]
    if others:
        return others[0]
    named = next((str(split) for split in wanted if split and split != source.split), "train")
    raise DataError(
        f"eval.num_fewshot: {num_fewshot} examples, but {source.task} has only the split that is evaluated "
        f"({source.split}); add {named}.jsonl beside {source.files[source.split]}, or take eval.num_fewshot=0"
    )
