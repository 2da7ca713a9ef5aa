"""Per-item numbers of many cells: only the columns that a report needs, as arrays."""

from collections.abc import Iterable, Mapping, Sequence
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
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    lists = ["loglikelihoods", *(["choice_chars"] if with_chars else [])]
    numbers = [name for name in names if name in _TEXT or name.startswith(METRIC_PREFIX)]
    columns = ["task", "item", *numbers, *(name for name in lists if name in names)]
    table = parquet.read(columns=columns, use_threads=False).combine_chunks()
    codes, tasks = _coded(table["task"])
    items = table["item"].to_numpy().astype(np.int64)
    flat = {name.removeprefix(METRIC_PREFIX): table[name].to_numpy().astype(np.float64) for name in numbers}
    padded = {
        name: _padded(table[name], -np.inf if name == "loglikelihoods" else 1.0) for name in lists if name in names
    }
    found = {}
    for number, task in enumerate(tasks):
        rows = np.flatnonzero(codes == number)
        rows = rows[np.argsort(items[rows], kind="stable")]
        values = {name: column[rows] for name, column in flat.items()}
        matrices = {name: _trimmed(*matrix, rows) for name, matrix in padded.items()}
        found[task] = TaskItems(
            items[rows],
            {name: column for name, column in values.items() if _has(name, column)},
            matrices.get("loglikelihoods"),
            matrices.get("choice_chars"),
        )
    return found


def _has(name: str, column: Floats) -> bool:
    """KL and agreement are known of a slice of the windows; everything else is known of every item or does not apply."""
    missing = np.isnan(column)
    return not (missing.all() if name in _SLICE else missing.any())


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _padded(column: pa.ChunkedArray, fill: float) -> tuple[Floats, NDArray[np.int64]]:
    """Lists as a matrix [n, longest], and their lengths [n]."""
    array = column.combine_chunks()
    lists = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    lengths = np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
    matrix = np.full((len(lengths), int(lengths.max(initial=0))), fill)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return matrix, lengths


def _trimmed(matrix: Floats, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> Floats | None:
    width = int(lengths[rows].max(initial=0))
    return matrix[rows, :width] if width else None


_CHUNK = 200


def read_many(
    files: Mapping[str, Path], with_chars: Iterable[str], problems: list[str], pool: Executor
) -> dict[str, Samples]:
    """Samples by cell id; a file that cannot be read is a problem, and left out."""
    chars = set(with_chars)
    there = {cell: file for cell, file in files.items() if file.is_file()}
    if gone := [files[cell].parent.name for cell in files if cell not in there]:
        problems.append(
            f"samples.parquet is missing in {len(gone)} records ({gone[0]}{', …' if len(gone) > 1 else ''}): they have no intervals"
        )
    wanted = [(cell, file, cell in chars) for cell, file in there.items()]
    chunks = [wanted[at : at + _CHUNK] for at in range(0, len(wanted), _CHUNK)]
    found = {cell: one for chunk in pool.map(_read_chunk, chunks) for cell, one in chunk}
    problems += [one for one in found.values() if isinstance(one, str)]
    return {cell: one for cell, one in found.items() if not isinstance(one, str)}


def _read_chunk(wanted: Sequence[tuple[str, Path, bool]]) -> list[tuple[str, Samples | str]]:
    """Samples, or what is wrong with them."""
    found: list[tuple[str, Samples | str]] = []
    for cell, file, with_chars in wanted:
        try:
            found.append((cell, read_samples(file, with_chars)))
        except (OSError, ValueError, KeyError) as error:
            found.append(
                (cell, f"record {file.parent.name}: samples.parquet: {error}; remove the folder and run its cell again")
            )
    return found
