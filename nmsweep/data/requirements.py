"""Requirements of a task besides its items: a split for few-shot examples, optional packages, nltk data. No torch."""

from importlib.util import find_spec

from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError

PACKAGES = {"ifeval": ("langdetect", "immutabledict", "nltk")}
"""Packages that a task's code imports."""

NLTK_DATA = {"ifeval": "tokenizers/punkt_tab"}
"""Data that a task's code would otherwise download when it is first imported."""


def missing_extras(source: TaskSource) -> list[str]:
    """Return one message for each task that lacks a package or nltk data."""
    messages = []
    for task in (leaf.task for leaf in source.leaves):
        missing = [package for package in PACKAGES.get(task, ()) if find_spec(package) is None]
        if missing:
            messages.append(
                f"tasks: {task} needs {', '.join(missing)}; install them: pip install 'nmsweep[{task}]', or leave it out"
            )
        elif task in NLTK_DATA and not _has_nltk_data(NLTK_DATA[task]):
            name = NLTK_DATA[task].rpartition("/")[2]
            messages.append(
                f"tasks: {task} needs nltk's {name}, which is not on this machine; run `python -m nltk.downloader {name}` "
                "where there is a network, and set NLTK_DATA=DIR if that is another machine's folder"
            )
    return messages


def _has_nltk_data(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(name)
    except LookupError:
        return False
    return True


def needs_split(source: TaskSource, num_fewshot: int) -> bool:
    """Return whether examples are drawn from a split, rather than written out in the task's YAML."""
    has_samples = (source.config.get("fewshot_config") or {}).get("samples")
    return source.kind == "harness" and num_fewshot > 0 and bool(_named_split(source) or not has_samples)


def fewshot_split(source: TaskSource, num_fewshot: int) -> str:
    """Return the split for few-shot examples: the harness's choice among those that exist and are not evaluated.

    Raises:
        DataError: there is only the evaluated split.
    """
    candidates = [_named_split(source), source.config.get("training_split"), source.config.get("validation_split")]
    others = [str(split) for split in candidates if split and not _overlap(str(split), source.split)]
    if available := [split for split in others if not source.files or split in source.files]:
        return available[0]
    problem = f"eval.num_fewshot: {num_fewshot} examples, but {source.task} has only the split that is evaluated ({source.split})"
    if not source.files:
        raise DataError(f"{problem}; take eval.num_fewshot=0, or leave the task out")
    name = others[0] if others else "train"
    raise DataError(f"{problem}; add {name}.jsonl beside {source.files[source.split]}, or take eval.num_fewshot=0")


def _named_split(source: TaskSource) -> str | None:
    """Return the split that the task's YAML names for examples; None if it leaves the choice to the harness."""
    split = (source.config.get("fewshot_config") or {}).get("split") or source.config.get("fewshot_split")
    return None if split is None else str(split)


def _overlap(split: str, other: str) -> bool:
    """Return whether two splits may share rows: ``train`` and ``train[:10%]`` may; two slices are taken to be disjoint."""
    same_name = split.partition("[")[0] == other.partition("[")[0]
    return split == other or (same_name and not ("[" in split and "[" in other))
