"""The text of items."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from nmsweep.results.layout import items_file
from nmsweep.results.read import Results

_MOST_CHARS = 600


def item_texts(results: Results, task: str, items: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return text (its end, where the question is), choices and right answer of items, by number; empty if not kept."""
    texts: dict[int, dict[str, Any]] = {}
    for file in sorted(_files(results, task)):
        for row in _rows(file, items):
            text, choices = str(row["text"]), [str(choice)[:_MOST_CHARS] for choice in row["choices"]]
            texts[int(row["item"])] = {"text": text[-_MOST_CHARS:], "choices": choices, "gold": str(row["gold"])}
    return texts


def _files(results: Results, task: str) -> set[Path]:
    """Files of the items that the cells answered: usually one."""
    versions = ((cell.get("tasks") or {}).get(task, {}).get("data") for cell in results.provenance.values())
    return {file for data in set(versions) if data and (file := items_file(results.folder, task, str(data))).is_file()}


def _rows(file: Path, items: Collection[int]) -> list[dict[str, Any]]:
    try:
        table = pd.read_parquet(file, columns=["item", "text", "choices", "gold"])
    except (OSError, ValueError):  # being written, or of another version: the page has no texts
        return []
    return [
        {str(key): value for key, value in row.items()} for row in table[table["item"].isin(items)].to_dict("records")
    ]
