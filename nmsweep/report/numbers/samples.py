"""Per-item numbers of many cells: only the columns that a report needs, as arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METRIC_PREFIX = "metric_"
_SLICE = ("kl", "top1_agreement", "n_compared")
_TEXT = ("nll", "n_tokens", *_SLICE)


@dataclass(frozen=True)
class TaskItems:
    """The items of one task in one cell, by item number.

    Attributes:
        item: [n] numbers.
        values: [n] each: a metric's value per item by the metric's name; `nll`, `n_tokens`, `kl`, … of a text's windows.
            `kl` and its like may be NaN.
        loglikelihoods: [n, choices] in nats, −inf where an item has fewer choices; None without any.
        chars: [n, choices] characters of each choice; None unless asked for.
    """

    item: NDArray[np.int64]
    values: Mapping[str, Floats]
    loglikelihoods: Floats | None = None
    chars: Floats | None = None


Samples = Mapping[str, TaskItems]
"""By task."""


_LISTS = {"loglikelihoods": -np.inf, "choice_chars": 1.0}
"""Columns of lists, and what stands where an item has fewer choices than others."""

_DAMAGED = (OSError, ValueError, KeyError)
"""What a damaged file ends in; `pyarrow.ArrowInvalid` is a ValueError."""


@dataclass(frozen=True)
class _Block:
    """The rows of files that have the same columns, as one: sorted by file, then by task, then by item.

    Attributes:
        files: numbers of the files.
        parts: number of the file, task, first row and the one after the last, names of the values that are there with
            their rows in `flat`, and widths of the `matrices`; of each task in each file.
        item: [rows].
        flat: [names, rows].
        matrices: [rows, longest] by the column's name.
    """

    files: Sequence[int]
    parts: Sequence[tuple[int, str, int, int, Sequence[tuple[str, int]], Sequence[int]]]
    item: NDArray[np.int64]
    flat: Floats
    matrices: Mapping[str, Floats]

    def samples(self) -> dict[int, dict[str, TaskItems]]:
        """By number of the file; views, no copies."""
        found: dict[int, dict[str, TaskItems]] = {file: {} for file in self.files}
        for file, task, start, end, there, widths in self.parts:
            lists = {
                name: matrix[start:end, :width]
                for (name, matrix), width in zip(self.matrices.items(), widths, strict=True)
                if width
            }
            values = {name: self.flat[row, start:end] for name, row in there}
            found[file][task] = TaskItems(
                self.item[start:end], values, lists.get("loglikelihoods"), lists.get("choice_chars")
            )
        return found


def _columns(file: str, with_chars: bool) -> pa.Table:
    """The columns of one file that a report needs."""
    with open(file, "rb") as opened:
        parquet = pq.ParquetFile(pa.BufferReader(opened.read()))
    wanted = ["task", "item", *_TEXT, *(_LISTS if with_chars else ["loglikelihoods"])]  # those that there are
    wanted += [name for name in parquet.schema.names if name.startswith(METRIC_PREFIX)]
    return parquet.read(columns=wanted, use_threads=False)


def _block(tables: Mapping[int, pa.Table]) -> _Block:
    """Tables with the same columns as one block.

    Raises:
        ValueError, KeyError: what is in one of them is damaged.
    """
    table = pa.concat_tables(tables.values())
    if table["task"].null_count or table["item"].null_count:
        raise ValueError("has a row without task or item")
    tasks = _whole(table["task"]).dictionary_encode()
    names = tasks.dictionary.to_pylist()
    place = np.repeat(np.arange(len(tables)), [len(one) for one in tables.values()])
    keys = place * len(names) + tasks.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    items = table["item"].to_numpy().astype(np.int64)
    numbers = [name for name in table.column_names if name in _TEXT or name.startswith(METRIC_PREFIX)]
    flat = np.array([table[name].to_numpy() for name in numbers], dtype=np.float64).reshape(len(numbers), len(items))
    padded = {
        field.name: _padded(table[field.name], _LISTS[field.name])
        for field in table.schema
        if field.name in _LISTS and not pa.types.is_null(field.type)  # of no type where no item has choices
    }
    if not _in_order(keys, items):
        order = np.lexsort((items, keys))
        keys, items, flat = keys[order], items[order], flat[:, order]
        padded = {name: (matrix[order], lengths[order]) for name, (matrix, lengths) in padded.items()}
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(starts, len(keys))[1:]
    widths = [np.maximum.reduceat(lengths, starts).tolist() for _, lengths in padded.values()]
    files = list(tables)
    parts = [
        (files[key // len(names)], names[key % len(names)], start, end, there, width)
        for key, start, end, there, *width in zip(
            keys[starts].tolist(),
            starts.tolist(),
            ends.tolist(),
            _there(numbers, flat, starts, ends),
            *widths,
            strict=True,
        )
    ]
    return _Block(files, parts, items, flat, {name: matrix for name, (matrix, _) in padded.items()})


def _there(
    names: Sequence[str], flat: Floats, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[list[tuple[str, int]]]:
    """Of each part, the values that it has, with their rows in `flat`.

    KL and agreement are known of a slice of the windows; everything else is known of every item or does not apply.
    """
    gaps = np.add.reduceat(np.isnan(flat), starts, axis=1, dtype=np.int64)
    has = np.where(np.isin(names, _SLICE)[:, None], gaps < ends - starts, gaps == 0)
    known: dict[tuple[bool, ...], list[tuple[str, int]]] = {}  # most parts have the same
    for kind in map(tuple, has.T.tolist()):
        if kind not in known:
            known[kind] = [(name.removeprefix(METRIC_PREFIX), row) for row, name in enumerate(names) if kind[row]]
        yield known[kind]


def _in_order(keys: NDArray[np.int64], items: NDArray[np.int64]) -> bool:
    """Whether rows are sorted by key, then by item: those that nmsweep wrote are."""
    steps = np.diff(keys)
    return bool(((steps > 0) | ((steps == 0) & (np.diff(items) >= 0))).all())


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _padded(column: pa.ChunkedArray, fill: float) -> tuple[Floats, NDArray[np.int64]]:
    """Lists as a matrix [n, longest], and their lengths [n]."""
    lists = _whole(column)
    lengths = np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
    matrix = np.full((len(lengths), int(lengths.max(initial=0))), fill)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return matrix, lengths


_CHUNK = 200


Found = Mapping[Path, Samples | str]
"""By file: its samples, or what is wrong with them."""


def begin_reading(files: Sequence[Path], pool: Executor, with_chars: bool = False) -> Callable[[], Found]:
    """Have files read; what is returned waits for them."""
    chunks = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]
    futures = [pool.submit(_read_chunk, [str(file) for file in chunk], with_chars) for chunk in chunks]
    return lambda: {
        chunk[number]: one
        for chunk, future in zip(chunks, futures, strict=True)
        for found in future.result()
        for number, one in (found.samples() if isinstance(found, _Block) else found).items()
    }


def read_many(
    files: Mapping[str, Path],
    with_chars: Iterable[str],
    problems: list[str],
    pool: Executor,
    begun: Callable[[], Found] | None = None,
) -> dict[str, Samples]:
    """Samples by cell id; a file that cannot be read is a problem, and left out.

    Args:
        files: by cell id.
        with_chars: cells whose characters of choices are wanted.
        problems: is told of files that are missing or damaged.
        pool: reads them.
        begun: `begin_reading` of files of the same folder, where that was started before the cells were known.
    """
    there = {cell: file for cell, file in files.items() if file.is_file()}
    if gone := [files[cell].parent.name for cell in files if cell not in there]:
        problems.append(
            f"samples.parquet is missing in {len(gone)} records ({gone[0]}{', …' if len(gone) > 1 else ''}): they have no intervals"
        )
    chars = [there[cell] for cell in set(with_chars) & set(there)]
    dense = begin_reading(chars, pool, with_chars=True)
    read = {**begun()} if begun else {}
    known = {*read, *chars}
    late = begin_reading([file for file in there.values() if file not in known], pool)
    read |= {**late(), **dense()}
    found = {cell: read[file] for cell, file in there.items()}
    problems += [one for one in found.values() if isinstance(one, str)]
    return {cell: one for cell, one in found.items() if not isinstance(one, str)}


def _read_chunk(files: Sequence[str], with_chars: bool) -> list[_Block | dict[int, str]]:
    """Blocks of samples, and what is wrong with the files that are damaged; by a file's place in `files`."""
    same: dict[Any, dict[int, pa.Table]] = {}
    wrong: dict[int, Exception] = {}
    for number, file in enumerate(files):
        try:
            table = _columns(file, with_chars)
        except _DAMAGED as error:
            wrong[number] = error
            continue
        same.setdefault(tuple((field.name, field.type) for field in table.schema), {})[number] = table
    blocks = [block for tables in same.values() for block in _blocks(tables, wrong)]
    return [*blocks, {number: f"record {Path(files[number]).parent.name}: samples.parquet: {error}; remove the folder and run its cell again" for number, error in wrong.items()}]  # fmt: skip


def _blocks(tables: Mapping[int, pa.Table], wrong: dict[int, Exception]) -> Iterator[_Block]:
    """One block; if that fails, one a file, and those that are damaged are left out."""
    try:
        yield _block(tables)
    except _DAMAGED as error:
        if len(tables) == 1:
            wrong.update(dict.fromkeys(tables, error))
            return
        for number, table in tables.items():
            yield from _blocks({number: table}, wrong)
