"""The items of a task as people read them, once for each data set in `results/items/`."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from nmsweep.config.schema import short_hash
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import Busy
from nmsweep.evaluate.groups import numbered
from nmsweep.evaluate.kept import KeptTask, kept_task
from nmsweep.evaluate.prompting import Prompting
from nmsweep.results.claims import claimed
from nmsweep.results.layout import items_file
from nmsweep.results.storage import whole_file

WAIT_S = 0.2
"""Between looks at what another process is writing."""


def keep_items(results_dir: Path, source: TaskSource, data: str, prompting: Prompting) -> None:
    """Write the items that a cell was measured on, unless a file with as many is there.

    Processes that measure different numbers of them write one after the other: fewer never take the place of more.

    Args:
        results_dir: the results folder.
        source: a task of the harness.
        data: what identifies its data in the cell's provenance.
        prompting: says how many items were measured.
    """
    place = items_file(results_dir, source.task, data)
    members = [kept_task(leaf, leaf.shots(prompting.num_fewshot)) for leaf in source.leaves]
    sizes = [min(len(kept.docs), prompting.limit or len(kept.docs)) for kept in members]
    while _n_items(place) < sum(sizes):
        try:
            with claimed(results_dir, f"items-{short_hash(place.name)}", f"items of {source.task}"):
                if _n_items(place) < sum(sizes):
                    _write(place, members, sizes)
        except Busy:
            time.sleep(WAIT_S)


def _n_items(place: Path) -> int:
    return int(pq.read_metadata(place).num_rows) if place.is_file() else 0


def _write(place: Path, members: Sequence[KeptTask], sizes: Sequence[int]) -> None:
    tables = [items_table(kept, n_items) for kept, n_items in zip(members, sizes, strict=True)]
    with whole_file(place) as file:
        numbered(tables).to_parquet(file, index=False)


def items_table(kept: KeptTask, n_items: int) -> pd.DataFrame:
    """The first items.

    Returns:
        `item`, `doc_hash`, `text` (without few-shot examples), `text_chars`, `choices`, `choice_chars`, `gold` (the right
        choice's index, or the right answer).
    """
    rows = []
    for item in range(n_items):
        text, choices = kept.text(item), kept.choices(item)
        rows.append(
            {
                "item": item, "doc_hash": kept.doc_hash(item), "text": text, "text_chars": len(text),
                "choices": choices, "choice_chars": [len(choice) for choice in choices], "gold": kept.gold(item),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
