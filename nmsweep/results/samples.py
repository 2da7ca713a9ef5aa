"""The per-item records of many cells (`samples.parquet`) as arrays."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nmsweep.results.tidy import PERPLEXITY

Floats = NDArray[np.float64]

METRIC_PREFIX = "metric_"
"""Columns of samples.parquet with one item's value of a metric."""

WEIGHT_PREFIX = "weight_"
"""Columns with one item's weight in a metric of a group, where its subtasks count alike whatever their size."""

_NUMBERS = ("nll", "n_tokens", "kl", "top1_agreement", "n_compared")
_LISTS = ("loglikelihoods", "choice_chars")
_TYPES: Mapping[str, Any] = {
    "task": pa.string(), "subtask": pa.string(), "item": pa.int64(), **dict.fromkeys(_NUMBERS, pa.float64()),
    **dict.fromkeys(_LISTS, pa.list_(pa.float64())),
    "doc_hash": pa.string(), "prediction": pa.float64(), "gold": pa.string(), "response": pa.string(),
}  # fmt: skip

STATISTICS = ("task", "subtask", "item", *_NUMBERS, *_LISTS)
"""Columns that statistics need, besides those with a prefix."""


@dataclass(frozen=True, eq=False)
class ItemGroup:
    """Cells that answered the same items of one task.

    Attributes:
        task: its name.
        rows: row of each cell in the arrays.
        item: item numbers, [items].
        values: [cells, items] by name: a metric's values under the metric's name; of a text's windows `nll` (nats, summed
            over the window), `n_tokens`, `kl` (nats), `top1_agreement`, `n_compared` (tokens). NaN where not recorded.
        loglikelihoods: [cells, items, choices] in nats, NaN where an item has fewer choices; None without choices.
        choice_chars: characters of each choice, [items, choices], NaN likewise; None where not recorded.
        subtask: the subtask of each item, [items]; None outside groups of tasks.
        equal_subtasks: metrics that are the mean over subtasks of any size, not over items.
    """

    task: str
    rows: Mapping[str, int]
    item: NDArray[np.int64]
    values: Mapping[str, Floats]
    loglikelihoods: Floats | None = None
    choice_chars: Floats | None = None
    subtask: tuple[str, ...] | None = None
    equal_subtasks: frozenset[str] = field(default_factory=frozenset)

    def of(self, name: str, cells: Sequence[str]) -> Floats:
        """Return one of the `values`, [cells, items]."""
        return self.values[name][[self.rows[cell] for cell in cells]]

    def cells_with(self, metric: str) -> set[str]:
        """Return the cells that have the metric of every item."""
        values = self.values.get("nll" if metric == PERPLEXITY else metric)
        if values is None:
            return set()
        missing = np.isnan(values).sum(axis=1)
        return {cell for cell, row in self.rows.items() if missing[row] == 0}

    @property
    def metrics(self) -> list[str]:
        """The metrics that some cell has, perplexity first."""
        texts = [PERPLEXITY] if "nll" in self.values else []
        # a metric named perplexity without windows (LAMBADA's) is no mean over items
        return texts + sorted(name for name in self.values if name not in _NUMBERS and PERPLEXITY not in name)


def read_samples(file: Path, columns: Collection[str] = STATISTICS) -> pa.Table:
    """Read columns of a `samples.parquet`, as `typed` returns them.

    Raises:
        OSError, ValueError, KeyError: it is missing or damaged.
    """
    parquet = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
    return typed(parquet.read(columns=_wanted(parquet.schema_arrow.names, columns), use_threads=False))


def _wanted(names: Iterable[str], columns: Collection[str]) -> list[str]:
    return [name for name in names if name in columns or name.startswith((METRIC_PREFIX, WEIGHT_PREFIX))]


def typed(samples: pa.Table | pd.DataFrame) -> pa.Table:
    """Return samples with the same types of columns in every table.

    Raises:
        ValueError: a column has another type, or a row no task or item.
        KeyError: there are no tasks or items.
    """
    if isinstance(samples, pd.DataFrame):
        samples = pa.Table.from_pandas(samples[_wanted(samples.columns, STATISTICS)], preserve_index=False)
    if samples["task"].null_count or samples["item"].null_count:
        raise ValueError("a row has no task or item")
    return samples.cast(pa.schema([(name, _TYPES.get(name, pa.float64())) for name in samples.column_names]))


def read_groups(files: Mapping[str, Path], problems: list[str]) -> list[ItemGroup]:
    """Read the items of many cells.

    Args:
        files: the `samples.parquet` of each cell id.
        problems: receives a message for the files that are missing and for each that is damaged; their cells are left out.
    """
    tables: dict[str, pa.Table] = {}
    missing = []
    for cell, file in files.items():
        try:
            tables[cell] = read_samples(file)
        except FileNotFoundError:
            missing.append(file.parent.name)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
            problems.append(
                f"record {file.parent.name}: samples.parquet: {error}; remove the folder and run its cell again"
            )
    if missing:
        problems.append(
            f"samples.parquet is missing in {len(missing)} records ({missing[0]}{', …' if len(missing) > 1 else ''}): they have no intervals",
        )
    return list(item_groups(tables))


def item_groups(tables: Mapping[str, pa.Table]) -> Iterator[ItemGroup]:
    """Group the cells that answered the same items.

    Args:
        tables: of each cell, from `typed`.
    """
    if not tables:
        return
    cells = list(tables)
    row_cells = np.repeat(np.arange(len(cells)), [len(table) for table in tables.values()])
    whole = pa.concat_tables(tables.values(), promote_options="default").append_column("cell", pa.array(row_cells))
    for task in pc.unique(whole["task"]).to_pylist():
        rows = whole.filter(pc.equal(whole["task"], task)).combine_chunks()
        order = np.lexsort((rows["item"].to_numpy(), rows["cell"].to_numpy()))
        if (np.diff(order) != 1).any():
            rows = rows.take(order)
        yield from _groups_of(task, rows, cells)


def _groups_of(task: str, rows: pa.Table, cells: Sequence[str]) -> Iterator[ItemGroup]:
    """Groups of one task; rows are sorted by cell, then by item."""
    item = rows["item"].to_numpy()
    tokens = _floats(rows["n_tokens"]) if "n_tokens" in rows.column_names else np.zeros(0)
    codes, starts = np.unique(rows["cell"].to_numpy(), return_index=True)
    same: dict[bytes, list[tuple[str, int, int]]] = {}
    for code, start, end in zip(codes.tolist(), starts.tolist(), [*starts[1:].tolist(), len(item)], strict=True):
        key = item[start:end].tobytes() + tokens[start:end].tobytes()  # windows of another tokenizer are other items
        same.setdefault(key, []).append((cells[code], start, end - start))
    columns = {name: _floats(rows[name]) for name in rows.column_names if pa.types.is_floating(rows[name].type)}
    lists = {name: _padded(rows[name]) for name in _LISTS if name in rows.column_names}
    subtask = rows["subtask"].to_pylist() if "subtask" in rows.column_names else []
    for members in same.values():
        place = np.array([start for _, start, _ in members])[:, None] + np.arange(members[0][2])
        values = {name.removeprefix(METRIC_PREFIX): column[place] for name, column in columns.items()}
        values = {name: value for name, value in values.items() if not np.isnan(value).all()}
        weighted = {name.removeprefix(WEIGHT_PREFIX) for name in values if name.startswith(WEIGHT_PREFIX)}
        lls, chars = (_trimmed(lists[name][place]) if name in lists else None for name in _LISTS)
        if chars is not None:  # a property of the items, which some cells may lack
            known = ~np.isnan(chars).all(axis=(1, 2))
            chars = chars[np.argmax(known)]
        yield ItemGroup(
            task,
            {cell: row for row, (cell, _, _) in enumerate(members)},
            item[place[0]],
            {name: value for name, value in values.items() if not name.startswith(WEIGHT_PREFIX)},
            lls,
            chars,
            tuple(subtask[at] for at in place[0]) if subtask and subtask[place[0, 0]] else None,
            frozenset(weighted),
        )


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _padded(column: pa.ChunkedArray) -> Floats:
    """Lists as a matrix [rows, longest], NaN beyond a list's end."""
    lists = pa.concat_arrays(column.chunks)
    lengths = np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
    matrix = np.full((len(lengths), int(lengths.max(initial=0))), np.nan)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return matrix


def _trimmed(lists: Floats) -> Floats | None:
    """Without choices that no item has; None if there is none at all."""
    width = int((~np.isnan(lists)).any(axis=(0, 1)).sum())
    return lists[..., :width] if width else None
