"""What a task's code needs beyond nmsweep's own dependencies, and how to get it. No torch, nothing downloaded."""

from importlib.util import find_spec

from nmsweep.data.tasks import TaskSource

PACKAGES = {"ifeval": ("langdetect", "immutabledict", "nltk")}
"""Packages that a task's code imports."""

NLTK_DATA = {"ifeval": "tokenizers/punkt_tab"}
"""Data of nltk that a task's code would download when it is first imported."""


def missing_extras(source: TaskSource) -> list[str]:
    """One message for each task that lacks something."""
    messages = []
    for task in (leaf.task for leaf in source.leaves):
        lacking = [package for package in PACKAGES.get(task, ()) if find_spec(package) is None]
        if lacking:
            messages.append(
                f"tasks: {task} needs {', '.join(lacking)}; install them: pip install 'nmsweep[{task}]', or leave it out"
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
