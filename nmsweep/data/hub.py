"""Data sets of the Hugging Face hub: what identifies them, their rows, and the one message where they cannot be had."""

import hashlib
from functools import cache
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from huggingface_hub import constants

from nmsweep.errors import DataError

_TIMEOUT_S = 10.0

_REASON_CHARS = 200
"""Of another library's error, in a message."""


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


def hub_rows(path: str, name: str | None, split: str, **options: Any) -> list[dict[str, Any]]:
    """All rows of a hub data set's split; `options` as the data library takes them.

    Raises:
        DataError: the hub does not give it.
    """
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split, **options)]
    except Exception as error:  # as in `hub_fingerprint`
        raise unreachable(path, error) from error


def hub_size(path: str, name: str | None, **options: Any) -> int | None:
    """Bytes that a hub data set takes to download; None where it does not say.

    Raises:
        DataError: the hub does not give it.
    """
    import datasets

    try:
        size = datasets.load_dataset_builder(path, name, **options).info.download_size
    except Exception as error:  # as in `hub_fingerprint`
        raise unreachable(path, error) from error
    return None if size is None else int(size)


def why_unreachable() -> str:
    """Why the hub cannot be reached, asked for anything at all; empty if it answers.

    The data library would try for half a minute for each data set.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(constants.ENDPOINT, timeout=_TIMEOUT_S).close()
    except HTTPError:  # it answers
        return ""
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unreachable(path: str, error: Exception) -> DataError:
    """The one message for a data set that the hub does not give."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(
        f"data {path}: the hub does not give it ({reason[:_REASON_CHARS]}); pass data.mirror=DIR with local files, "
        "run `nmsweep prefetch` on a connected machine, or use tasks=mini"
    )
