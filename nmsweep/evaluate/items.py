"""The items of a task as people read them, once for each data set in `results/items/`."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from nmsweep.data.tasks import TaskSource
from nmsweep.disk.storage import whole_file
from nmsweep.evaluate.groups import numbered
from nmsweep.evaluate.kept import KeptTask, kept_task
from nmsweep.evaluate.prompting import Prompting
from nmsweep.record import items_file


def keep_items(results_dir: Path, source: TaskSource, data: str, prompting: Prompting) -> None:
    """Write the items that a cell was measured on, unless a file with as many is there.

    Args:
        results_dir: the results folder.
        source: a task of the harness.
        data: what identifies its data in the cell's provenance.
        prompting: says how many items were measured.
    """
    place = items_file(results_dir, source.task, data)
    members = [kept_task(leaf, leaf.shots(prompting.num_fewshot)) for leaf in source.leaves]
    sizes = [min(len(kept.docs), prompting.limit or len(kept.docs)) for kept in members]
    if place.is_file() and pq.read_metadata(place).num_rows >= sum(sizes):
        return
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
