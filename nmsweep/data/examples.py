"""Which split few-shot examples come from: never the one that is evaluated."""

from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError


def fewshot_split(source: TaskSource, num_fewshot: int) -> str:
    """The split that examples are taken from: the one that the harness would take, if its file is there.

    Raises:
        DataError: there is no file but the evaluated split's.
    """
    wanted = [source.config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    others = [str(split) for split in wanted if split in source.files and split != source.split]
    if others:
        return others[0]
    named = next((str(split) for split in wanted if split and split != source.split), "train")
    raise DataError(
        f"eval.num_fewshot: {num_fewshot} examples, but {source.task} has only the split that is evaluated "
        f"({source.split}); add {named}.jsonl beside {source.files[source.split]}, or take eval.num_fewshot=0"
    )


def check_examples(source: TaskSource, num_fewshot: int) -> None:
    """Refuse examples that would come from the evaluated split.

    Raises:
        DataError: the mirror has no other split.
    """
    if source.kind == "harness" and needs_split(source, num_fewshot):
        fewshot_split(source, num_fewshot)


def needs_split(source: TaskSource, num_fewshot: int) -> bool:
    """Whether examples are drawn from a local file: not where the task's YAML has them written out."""
    return bool(num_fewshot and source.files and not (source.config.get("fewshot_config") or {}).get("samples"))
