"""Cells and their parts on disk: what a record is, how it is written whole or not at all, how it is read. No torch.

Layout: `<results>/cells/<name>/` for finished cells, `<results>/.parts/<part_id>/<task>/` for finished tasks of
unfinished cells, `<results>/failed/<name>/` for failures, `<results>/items/` for the text of the items.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from nmsweep.errors import InputError
from nmsweep.results.storage import whole_folder

SCHEMA = 1
"""Version of the files of a cell; kept in provenance.json. Older versions stay readable."""

METRIC_COLUMNS = (
    "cell_id", "dense_cell_id", "model", "revision", "operand", "pattern", "n", "m", "criterion", "mitigation", "targets",
    "scope", "profile", "dtype", "task", "metric", "value", "stderr", "n_items", "sparsity", "flops_share", "seed", "status",
)  # fmt: skip
"""Columns of metrics.csv and tidy.csv, in order."""

LAYER_COLUMNS = ("cell_id", "layer", "in_features", "out_features", "channels", "kept", "sparsity", "flops_share")
"""Columns of layers.csv: `channels` seen and `kept` are counts over tokens; shares are 0 to 1."""

CELL_FILES = ("config.yaml", "metrics.csv", "layers.csv", "samples.parquet", "provenance.json")


@dataclass(frozen=True)
class Metric:
    """One number about one task. `value` and `stderr` in the metric's own unit; `n_items` items or windows."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n_items: int


@dataclass(frozen=True)
class LayerCount:
    """Channels seen and kept by one target layer, summed over tokens; features of its weight."""

    layer: str
    in_features: int
    out_features: int
    channels: int
    kept: int
    flops_share: float


@dataclass(frozen=True)
class Part:
    """One task of one cell, measured.

    Attributes:
        identity: what the numbers depend on beyond the part's id (data fingerprint, task version).
        metrics: the task's numbers.
        layers: channel counts of the target layers during this task; empty for a dense cell.
        samples: one row for each item or window.
        provenance: times, tokens, memory and what else is worth knowing but changes no number.
    """

    task: str
    identity: Mapping[str, Any]
    metrics: Sequence[Metric]
    layers: Sequence[LayerCount]
    samples: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CellRecord:
    """A finished cell, as its folder holds it."""

    folder: Path
    config: Mapping[str, Any]
    metrics: pd.DataFrame
    layers: pd.DataFrame
    samples: pd.DataFrame
    provenance: Mapping[str, Any]

    @property
    def cell_id(self) -> str:
        return str(self.provenance["cell_id"])


def cell_folder(results_dir: Path, model: str, pattern: str, criterion: str, mitigation: str, cell_id: str) -> Path:
    """Where a cell lies; the words are for people, the id alone decides."""
    words = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word)[:60] for word in (model, pattern, criterion, mitigation))
    return results_dir / "cells" / f"{words}_{cell_id}"


def find_cell(results_dir: Path, cell_id: str) -> Path | None:
    """The folder of a finished cell, whatever its words."""
    return next(iter((results_dir / "cells").glob(f"*_{cell_id}")), None)


def cell_index(results_dir: Path) -> dict[str, Path]:
    """The folder of every finished cell by its id, from one look at `cells/`."""
    return {folder.name.rpartition("_")[2]: folder for folder in cell_folders(results_dir)}


def items_file(results_dir: Path, task: str, data: str) -> Path:
    """Where a task's items lie as text; `data` identifies them, as in a cell's ``provenance["tasks"][task]["data"]``."""
    return results_dir / "items" / f"{task}_{data[:12]}.parquet"


def _write_json(place: Path, value: Any) -> None:
    place.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def write_cell(
    folder: Path,
    config: Mapping[str, Any],
    shared: Mapping[str, Any],
    metrics: Sequence[Metric],
    layers: Sequence[LayerCount],
    samples: pd.DataFrame,
    provenance: Mapping[str, Any],
) -> CellRecord:
    """Write a finished cell.

    Args:
        folder: its place, from `cell_folder`.
        config: the effective config.
        shared: the columns of metrics.csv that all its rows share (model, pattern, …).
        metrics: its numbers, one row each.
        layers: channel counts of the target layers.
        samples: the items of all tasks.
        provenance: the rest; `cell_id`, `schema` and `status` are in it.
    """
    rows = [{**shared, **asdict(metric)} for metric in metrics]
    table = pd.DataFrame(rows, columns=list(METRIC_COLUMNS))
    per_layer = [
        {
            **asdict(layer),
            "cell_id": shared["cell_id"],
            "sparsity": 1 - layer.kept / layer.channels if layer.channels else 0.0,
        }
        for layer in layers
    ]
    with whole_folder(folder) as place:
        (place / "config.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False))
        table.to_csv(place / "metrics.csv", index=False)
        pd.DataFrame(per_layer, columns=list(LAYER_COLUMNS)).to_csv(place / "layers.csv", index=False)
        samples.to_parquet(place / "samples.parquet", index=False)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in sorted(place.iterdir())
        }
        _write_json(place / "provenance.json", {"schema": SCHEMA, "files": files, **provenance})
    return read_cell(folder)


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def read_cell(folder: Path) -> CellRecord:
    """Read a finished cell.

    Raises:
        InputError: a file is missing or unreadable, or a later version wrote it; the message names it.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text())
        if is_newer(provenance):
            raise InputError(
                f"record {folder}: its schema is {provenance['schema']}; this version reads up to {SCHEMA}; update nmsweep"
            )
        return CellRecord(
            folder=folder,
            config=yaml.safe_load((folder / "config.yaml").read_text()),
            metrics=read_metrics(folder / "metrics.csv"),
            layers=pd.read_csv(folder / "layers.csv"),
            samples=pd.read_parquet(folder / "samples.parquet"),
            provenance=provenance,
        )
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"record {folder}: {type(error).__name__}: {error}; remove the folder and run its cell again"
        ) from error


def is_newer(provenance: Mapping[str, Any]) -> bool:
    """Whether a later version wrote a record, whose files may be others than this version knows."""
    schema = provenance.get("schema", 0)
    return isinstance(schema, int) and schema > SCHEMA


_NUMBERS = {
    "value": float,
    "stderr": float,
    "sparsity": float,
    "flops_share": float,
    "n": "Int64",
    "m": "Int64",
    "n_items": "Int64",
    "seed": "Int64",
}


def read_metrics(file: Path | IO[bytes]) -> pd.DataFrame:
    """Read a metrics.csv or tidy.csv; words such as ``none`` stay words, an empty `n` stays empty."""
    types: dict[str, Any] = {column: _NUMBERS.get(column, str) for column in METRIC_COLUMNS}
    return pd.read_csv(file, dtype=types, keep_default_na=False, na_values={column: [""] for column in _NUMBERS})


def cell_folders(results_dir: Path) -> list[Path]:
    """All finished cells of a results folder, sorted by name."""
    cells = results_dir / "cells"
    found = (folder for folder in cells.iterdir() if not folder.name.startswith(".")) if cells.is_dir() else ()
    return sorted(found, key=lambda folder: folder.name)


class Parts:
    """The finished tasks of one cell, kept so that a killed cell loses at most the task it was at.

    Args:
        results_dir: the results folder.
        part_id: identity of the cell without its task list.
    """

    def __init__(self, results_dir: Path, part_id: str) -> None:
        self.results_dir = results_dir
        self.folder = results_dir / ".parts" / part_id

    def read(self, task: str, identity: Mapping[str, Any]) -> Part | None:
        """The task's part, or None if there is none of this identity.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: it is damaged.
        """
        place = self.folder / task
        if not place.exists():
            return None
        stored = json.loads((place / "part.json").read_text())
        if stored["identity"] != json.loads(json.dumps(identity)):
            return None
        samples = pd.read_parquet(place / "samples.parquet")
        return Part(
            task,
            stored["identity"],
            [Metric(**metric) for metric in stored["metrics"]],
            [LayerCount(**layer) for layer in stored["layers"]],
            samples,
            stored["provenance"],
        )

    def write(self, part: Part) -> None:
        with whole_folder(self.folder / part.task) as place:
            part.samples.to_parquet(place / "samples.parquet", index=False)
            rest = {key: value for key, value in asdict(part).items() if key != "samples"}
            _write_json(place / "part.json", rest)

    def forget(self) -> None:
        """Drop all parts, for a run that is forced."""
        shutil.rmtree(self.folder, ignore_errors=True)


def failure_folder(results_dir: Path, name: str) -> Path:
    """Where the failure of the cell of this folder name lies."""
    return results_dir / "failed" / name


def write_failure(place: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Record a failed cell; a later success takes it away."""
    with whole_folder(place) as temporary:
        (temporary / "config.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False))
        _write_json(temporary / "provenance.json", {"schema": SCHEMA, "status": "failed", **provenance})


def failure_of(place: Path, launch: str | None = None) -> str | None:
    """Why a cell failed, in one launch or at all; None if it did not."""
    try:
        stored = json.loads((place / "provenance.json").read_text())
        return str(stored["error"]) if launch in (None, stored.get("launch")) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def clear_failure(folder: Path) -> None:
    """Take away the failure of a cell that has succeeded since."""
    shutil.rmtree(failure_folder(folder.parent.parent, folder.name), ignore_errors=True)
