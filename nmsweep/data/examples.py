"""Which split few-shot examples come from: never the one that is evaluated."""

from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError


def fewshot_split(source: TaskSource, num_fewshot: int) -> str:
    """The split that examples are taken from: the one that the harness would take, if it is there and not evaluated.

    Raises:
        DataError: there is no split but the evaluated one.
    """
    wanted = [_named_split(source), source.config.get("training_split"), source.config.get("validation_split")]
    others = [str(split) for split in wanted if split and not _overlap(str(split), source.split)]
    if there := [split for split in others if not source.files or split in source.files]:
        return there[0]
    only = f"eval.num_fewshot: {num_fewshot} examples, but {source.task} has only the split that is evaluated ({source.split})"
    if not source.files:
        raise DataError(f"{only}; take eval.num_fewshot=0, or leave the task out")
    named = others[0] if others else "train"
    raise DataError(f"{only}; add {named}.jsonl beside {source.files[source.split]}, or take eval.num_fewshot=0")


def check_examples(source: TaskSource, num_fewshot: int) -> None:
    """Refuse examples that would come from the evaluated split.

    Raises:
        DataError: there is no other split.
    """
    if needs_split(source, num_fewshot):
        fewshot_split(source, num_fewshot)


def needs_split(source: TaskSource, num_fewshot: int) -> bool:
    """Whether examples are drawn from a split: not where the task's YAML has them written out."""
    written = (source.config.get("fewshot_config") or {}).get("samples")
    return source.kind == "harness" and num_fewshot > 0 and bool(_named_split(source) or not written)


def _named_split(source: TaskSource) -> str | None:
    """The split that the task's YAML names for examples; None where it leaves that to the harness's rule."""
    named = (source.config.get("fewshot_config") or {}).get("split") or source.config.get("fewshot_split")
    return None if named is None else str(named)


def _overlap(split: str, other: str) -> bool:
    """Whether two splits may have rows in common: one of ``train`` and ``train[:10%]``; of two such parts the YAML says so."""
    return split == other or (
        split.partition("[")[0] == other.partition("[")[0] and not ("[" in split and "[" in other)
    )
