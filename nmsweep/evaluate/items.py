"""Keep the items of a task in readable form, once for each data set, in `results/items/`."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from nmsweep.config.schema import EvalConfig, short_hash
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import Busy
from nmsweep.evaluate.groups import concatenated
from nmsweep.evaluate.task import HarnessTask, harness_task
from nmsweep.results.claims import claimed
from nmsweep.results.layout import items_file
from nmsweep.results.storage import whole_file

WAIT_S = 0.2
"""Pause while another process writes the file."""


def keep_items(results_dir: Path, source: TaskSource, data: str, settings: EvalConfig) -> None:
    """Write the items that a cell was measured on, unless the file already has as many.

    Processes that measure different numbers of items take turns, so a shorter file never replaces a longer one.

    Args:
        results_dir: the results folder.
        source: a task of lm-eval.
        data: identifies its data in the cell's provenance.
        settings: says how many items were measured.
    """
    file = items_file(results_dir, source.task, data)
    members = [harness_task(leaf, leaf.shots(settings.num_fewshot)) for leaf in source.leaves]
    sizes = [min(len(task.docs), settings.limit or len(task.docs)) for task in members]
    while _n_items(file) < sum(sizes):
        try:
            with claimed(results_dir, f"items-{short_hash(file.name)}", f"items of {source.task}"):
                if _n_items(file) < sum(sizes):
                    _write(file, members, sizes)
        except Busy:
            time.sleep(WAIT_S)


def _n_items(file: Path) -> int:
    return int(pq.read_metadata(file).num_rows) if file.is_file() else 0


def _write(file: Path, members: Sequence[HarnessTask], sizes: Sequence[int]) -> None:
    tables = [items_table(task, n_items) for task, n_items in zip(members, sizes, strict=True)]
    with whole_file(file) as handle:
        concatenated(tables).to_parquet(handle, index=False)


def items_table(task: HarnessTask, n_items: int) -> pd.DataFrame:
    """Return the first items of a task.

    Returns:
        `item`, `doc_hash`, `text` (without few-shot examples), `text_chars`, `choices`, `choice_chars`, `gold` (the index of
        the right choice, or the right answer).
    """
    rows = []
    for item in range(n_items):
        text, choices = task.text(item), task.choices(item)
        rows.append(
            {
                "item": item, "doc_hash": task.doc_hash(item), "text": text, "text_chars": len(text),
                "choices": choices, "choice_chars": [len(choice) for choice in choices], "gold": task.gold(item),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
