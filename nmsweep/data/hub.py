"""Data sets of the Hugging Face hub: their revision, size and rows, and one message if they are not available."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from huggingface_hub import constants

from nmsweep.errors import DataError

_TIMEOUT_S = 10.0

_REASON_CHARS = 200
"""Longest part of another library's error in a message."""


@cache
def hub_fingerprint(path: str, name: str | None, split: str) -> str:
    """Return a hash of a split's name and revision; the revision comes from the hub or from the local cache.

    Raises:
        DataError: the hub cannot be reached and nothing is cached.
    """
    import datasets

    with _one_message(path):
        revision = datasets.load_dataset_builder(path, name).hash
    return hashlib.sha256(f"{path}/{name}/{split}@{revision}".encode()).hexdigest()


def hub_rows(path: str, name: str | None, split: str, **options: Any) -> list[dict[str, Any]]:
    """Return all rows of a split; `options` go to `datasets.load_dataset`.

    Raises:
        DataError: the hub does not give them.
    """
    import datasets

    with _one_message(path):
        return [dict(row) for row in datasets.load_dataset(path, name, split=split, **options)]


def hub_size(path: str, name: str | None, **options: Any) -> int | None:
    """Return the download size of a data set in bytes, or None if the hub does not tell.

    Raises:
        DataError: the hub does not give it.
    """
    import datasets

    with _one_message(path):
        size = datasets.load_dataset_builder(path, name, **options).info.download_size
    return None if size is None else int(size)


def why_unreachable() -> str:
    """Return why the hub cannot be reached, after one quick request; empty if it answers.

    `datasets` would retry for half a minute for each data set.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(constants.ENDPOINT, timeout=_TIMEOUT_S).close()
    except HTTPError:  # an answer, if not a friendly one
        return ""
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _one_message(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` raises a dozen kinds of errors, all of them for data that is not available
        raise unreachable(path, error) from error


def unreachable(path: str, error: Exception) -> DataError:
    """Return the error for a data set that the hub does not give."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(
        f"data {path}: the hub does not give it ({reason[:_REASON_CHARS]}); pass data.mirror=DIR with local files, "
        "run `nmsweep prefetch` on a connected machine, or use tasks=mini"
    )
