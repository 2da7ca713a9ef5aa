"""Per-item numbers of many cells: only the columns that a report needs, as arrays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

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


def read_samples(file: Path, with_chars: bool = False) -> Samples:
    """Read a samples.parquet.

    Raises:
        OSError, ValueError: it is missing or damaged (`pyarrow.ArrowInvalid` is a ValueError).
    """
    parquet = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
    names = parquet.schema_arrow.names
    lists = [name for name in ("loglikelihoods", *(["choice_chars"] if with_chars else [])) if name in names]
    numbers = [name for name in names if name in _TEXT or name.startswith(METRIC_PREFIX)]
    table = parquet.read(columns=["task", "item", *numbers, *lists], use_threads=False)
    codes, tasks = _coded(table["task"])
    items = table["item"].to_numpy().astype(np.int64)
    flat = np.array([table[name].to_numpy() for name in numbers], dtype=np.float64).reshape(len(numbers), len(items))
    padded = {name: _padded(table[name], -np.inf if name == "loglikelihoods" else 1.0) for name in lists}
    if not _in_order(codes, items):
        order = np.lexsort((items, codes))
        codes, items, flat = codes[order], items[order], flat[:, order]
        padded = {name: (matrix[order], lengths[order]) for name, (matrix, lengths) in padded.items()}
    ends = np.searchsorted(codes, range(len(tasks) + 1)).tolist()
    missing = np.isnan(flat)
    found = {}
    for task, start, end in zip(tasks, ends[:-1], ends[1:], strict=True):
        gaps = missing[:, start:end].sum(axis=1).tolist()
        values = {
            name.removeprefix(METRIC_PREFIX): column[start:end]
            for name, column, n_missing in zip(numbers, flat, gaps, strict=True)
            if _has(name, n_missing, end - start)
        }
        matrices = {name: _trimmed(matrix, lengths, start, end) for name, (matrix, lengths) in padded.items()}
        found[task] = TaskItems(items[start:end], values, matrices.get("loglikelihoods"), matrices.get("choice_chars"))
    return found


def _has(name: str, n_missing: int, n: int) -> bool:
    """KL and agreement are known of a slice of the windows; everything else is known of every item or does not apply."""
    return n_missing < n if name in _SLICE else not n_missing


def _in_order(codes: NDArray[np.int64], items: NDArray[np.int64]) -> bool:
    """Whether rows are sorted by task, then by item: those that nmsweep wrote are."""
    steps = np.diff(codes)
    return bool(((steps > 0) | ((steps == 0) & (np.diff(items) >= 0))).all())


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """Tasks by number, in the order in which they first appear."""
    encoded = _whole(column).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _padded(column: pa.ChunkedArray, fill: float) -> tuple[Floats, NDArray[np.int64]]:
    """Lists as a matrix [n, longest], and their lengths [n]."""
    lists = _whole(column)
    lengths = np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
    matrix = np.full((len(lengths), int(lengths.max(initial=0))), fill)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return matrix, lengths


def _trimmed(matrix: Floats, lengths: NDArray[np.int64], start: int, end: int) -> Floats | None:
    width = int(lengths[start:end].max(initial=0))
    return matrix[start:end, :width] if width else None


_CHUNK = 200


Found = Mapping[Path, Samples | str]
"""By file: its samples, or what is wrong with them."""


def begin_reading(files: Sequence[Path], pool: Executor, with_chars: bool = False) -> Callable[[], Found]:
    """Have files read; what is returned waits for them."""
    chunks = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]
    futures = [pool.submit(_read_chunk, chunk, with_chars) for chunk in chunks]
    return lambda: {file: one for future in futures for file, one in future.result()}


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


def _read_chunk(files: Sequence[Path], with_chars: bool) -> list[tuple[Path, Samples | str]]:
    found: list[tuple[Path, Samples | str]] = []
    for file in files:
        try:
            found.append((file, read_samples(file, with_chars)))
        except (OSError, ValueError, KeyError) as error:
            found.append(
                (file, f"record {file.parent.name}: samples.parquet: {error}; remove the folder and run its cell again")
            )
    return found
