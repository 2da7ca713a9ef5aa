"""Data sets of the Hugging Face hub: what identifies them, their rows, and the one message where they cannot be had."""

import hashlib
from functools import cache
from typing import Any

from nmsweep.errors import DataError


@cache
def hub_fingerprint(path: str, name: str | None, split: str) -> str:
    """What identifies a split of a hub data set: its revision, from the network or from the local cache.

    Raises:
        DataError: the hub cannot be reached and nothing is cached.
    """
    import datasets

    try:
        revision = datasets.load_dataset_builder(path, name).hash
    except Exception as error:  # the library raises a dozen kinds; each means that the data is not to be had
        raise unreachable(path, error) from error
    return hashlib.sha256(f"{path}/{name}/{split}@{revision}".encode()).hexdigest()


def hub_rows(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of a hub data set's split.

    Raises:
        DataError: the hub does not give it.
    """
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split)]
    except Exception as error:  # as in `hub_fingerprint`
        raise unreachable(path, error) from error


def hub_size(path: str, name: str | None) -> int | None:
    """Bytes that a hub data set takes to download; None where it does not say.

    Raises:
        DataError: the hub cannot be reached.
    """
    import datasets

    try:
        size = datasets.load_dataset_builder(path, name).info.download_size
    except Exception as error:  # as in `hub_fingerprint`
        raise unreachable(path, error) from error
    return None if size is None else int(size)


def unreachable(path: str, error: Exception) -> DataError:
    """The one message for a data set that the hub does not give."""
    return DataError(
        f"data {path}: the hub does not give it ({type(error).__name__}); pass data.mirror=DIR with local files, "
        "run `nmsweep prefetch` on a connected machine, or use tasks=mini"
    )
