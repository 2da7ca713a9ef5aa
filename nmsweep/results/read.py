"""All records of a results folder at once, quickly, while a sweep may be writing to it."""

import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from nmsweep.config.pattern import parse_pattern
from nmsweep.errors import InputError
from nmsweep.results.layout import CONFIG, FAILED, METRICS, PROVENANCE
from nmsweep.results.record import METRIC_COLUMNS, SCHEMA, cell_folders, read_metrics

FIELDS = (
    "model", "revision", "operand", "pattern", "criterion", "mitigation", "targets", "scope", "profile", "dtype", "seed",
)  # fmt: skip
"""What a cell is told apart by in a table."""

_NUMERIC = ("value", "stderr", "n", "m", "n_items", "sparsity", "flops_share", "seed")
_WORDS = tuple(name for name in METRIC_COLUMNS if name not in _NUMERIC)
_NOT_A_SETTING = ("results_dir", "data.mirror", "baseline", "plugins", "force", "device", "eval.batch_tokens", "eval.skip_missing")  # fmt: skip
_TOP_KEY = re.compile(r"(?<=\n)(?=[^ \-\n])")
"""Where config.yaml is cut into blocks."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        folder: the results folder.
        tidy: one row for each finished cell, task and metric, with the columns of metrics.csv.
        cells: one row a cell, indexed by cell id, failed ones too: `FIELDS`, `dense_cell_id`, `sparsity`, `flops_share`,
            `status`, `error`, `tasks` (joined by +), `variant` (settings that tell it from a cell with the same fields),
            `place` (its folder).
        configs: effective config by cell id.
        blocks: config.yaml by cell id, cut at its top-level keys: most cells share most blocks.
        provenance: provenance.json by cell id.
        problems: records that could not be read, one message each.
    """

    folder: Path
    tidy: pd.DataFrame
    cells: pd.DataFrame
    configs: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Mapping[str, Any]]
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problems: Sequence[str] = field(default_factory=tuple)

    @property
    def done(self) -> pd.DataFrame:
        return self.cells[self.cells["status"] == "done"]


@dataclass(frozen=True)
class _Files:
    """The small files of one cell, unparsed."""

    place: Path
    metrics: bytes
    config: str
    provenance: Mapping[str, Any]


def read_results(results_dir: Path) -> Results:
    """Read the metrics, configs and provenance of every cell, and the failures. Samples and layers are left alone.

    A folder that vanishes while it is read (a cell that is being replaced) is left out; a damaged one is a problem.

    Raises:
        InputError: the folder has no finished cell.
    """
    problems: list[str] = []
    files = _read_cells(cell_folders(results_dir), problems)
    tables = _parse_metrics(files, problems)
    if not tables:
        raise InputError(
            f"results_dir: {results_dir} has no finished cell{_because(problems)}; "
            "run `nmsweep` first or pass results_dir=DIR"
        )
    configs: dict[str, Mapping[str, Any]] = {}
    provenance: dict[str, Mapping[str, Any]] = {}
    places: dict[str, Path] = {}
    blocks: dict[str, list[str]] = {}
    for one in files:
        cell_id = str(one.provenance.get("cell_id") or one.place.name.rpartition("_")[2])
        blocks.setdefault(cell_id, _TOP_KEY.split(one.config))
        configs.setdefault(cell_id, read_config(blocks[cell_id]))
        provenance.setdefault(cell_id, one.provenance)
        places.setdefault(cell_id, one.place)
    tidy = pd.concat(tables, ignore_index=True).drop_duplicates(["cell_id", "task", "metric"])
    tidy = tidy.assign(**{name: _as_objects(tidy[name]) for name in _WORDS})
    tidy = tidy[tidy["cell_id"].isin(set(configs))]
    tidy = tidy.sort_values(
        ["model", "pattern", "criterion", "mitigation", "cell_id", "task", "metric"], ignore_index=True
    )
    cells = _cells(tidy, configs, places)
    failed = pd.DataFrame(_failures(results_dir, set(cells.index), configs, provenance, problems))
    if len(failed):
        cells = pd.concat([cells, failed.set_index("cell_id")])
    return Results(
        results_dir, tidy, cells.assign(variant=variants(cells, configs)), configs, provenance, blocks, problems
    )


def _because(problems: Sequence[str]) -> str:
    return f" that can be read ({problems[0]})" if problems else ""


_SLOW = 1e-3
"""Seconds a cell from which threads are worth it: a file server answers several at once, a near disk only waits for them."""


def _read_cells(folders: Sequence[Path], problems: list[str]) -> list[_Files]:
    started = time.perf_counter()
    found = [_read_one(folder) for folder in folders[:50]]
    if time.perf_counter() - started > _SLOW * len(found):
        with ThreadPoolExecutor(8) as pool:
            found += pool.map(_read_one, folders[50:])
    else:
        found += map(_read_one, folders[50:])
    problems += [one for one in found if isinstance(one, str)]
    return [one for one in found if isinstance(one, _Files)]


def _read_one(folder: Path) -> _Files | str | None:
    try:
        provenance = json.loads(_bytes(folder, PROVENANCE))
        if provenance.get("schema", 1) > SCHEMA:
            return f"record {folder.name}: schema {provenance['schema']}, of a newer nmsweep; at most {SCHEMA} is understood here; update nmsweep"
        return _Files(folder, _bytes(folder, METRICS), _bytes(folder, CONFIG).decode(), provenance)
    except (OSError, ValueError, AttributeError) as error:
        if not folder.is_dir():
            return None
        return f"record {folder.name}: {type(error).__name__}: {error}; remove the folder and run its cell again"


def _bytes(folder: Path, name: str) -> bytes:
    with open(f"{folder}/{name}", "rb") as file:  # making a path costs as much as reading it
        return file.read()


def _parse_metrics(files: list[_Files], problems: list[str]) -> list[pd.DataFrame]:
    """Files with one header are parsed as one; if that fails, one by one, and those that are damaged are taken out."""
    by_header: dict[bytes, list[_Files]] = {}
    for one in files:
        by_header.setdefault(one.metrics.partition(b"\n")[0], []).append(one)
    tables = []
    for header, same in by_header.items():
        body = b"\n".join(one.metrics.partition(b"\n")[2].rstrip(b"\n") for one in same)
        try:
            tables.append(_table(header + b"\n" + body))
        except (ValueError, InputError):
            for one in same:
                try:
                    tables.append(_table(one.metrics))
                except (ValueError, InputError) as error:
                    problems.append(
                        f"record {one.place.name}: metrics.csv: {error}; remove the folder and run its cell again"
                    )
                    files.remove(one)
    return [table for table in tables if len(table)]


def _table(text: bytes) -> pd.DataFrame:
    """metrics.csv as text; columns that an older version did not write are empty."""
    table = read_metrics(io.BytesIO(text))
    if missing := {"cell_id", "pattern", "task", "metric", "value"} - set(table.columns):
        raise InputError(f"has no column {', '.join(sorted(missing))}")
    if table["cell_id"].eq("").any() or table["value"].isna().any():
        raise InputError("has a row without cell_id or value")
    for pattern in table["pattern"].unique():
        parse_pattern(pattern)  # one that is none would end the whole report later
    for column in set(METRIC_COLUMNS) - set(table.columns):
        table[column] = np.nan if column in _NUMERIC else ""
    return table[list(METRIC_COLUMNS)]


def read_config(blocks: Iterable[str]) -> Mapping[str, Any]:
    """config.yaml by its blocks; thousands of files share most of them, and each distinct one is parsed once."""
    try:
        config: dict[str, Any] = {}
        for block in blocks:
            config |= _parsed(block)
        return config
    except (yaml.YAMLError, TypeError):
        return {}


@cache
def _parsed(block: str) -> Mapping[str, Any]:
    return yaml.load(block, Loader=_Loader) or {}


def _as_objects(words: pd.Series) -> pd.Series:
    """Words as Python's, each distinct one once: they are looked at one by one, which Arrow is slow at."""
    codes, distinct = pd.factorize(words)
    return pd.Series(np.asarray(distinct, dtype=object)[codes], index=words.index, dtype=object)


def _cells(tidy: pd.DataFrame, configs: Mapping[str, Any], places: Mapping[str, Path]) -> pd.DataFrame:
    cells = tidy.drop_duplicates("cell_id").set_index("cell_id")[[*FIELDS, "dense_cell_id", "sparsity", "flops_share", "status"]]  # fmt: skip
    tasks: dict[str, dict[str, None]] = {}
    for cell_id, task in zip(tidy["cell_id"].tolist(), tidy["task"].tolist(), strict=True):
        tasks.setdefault(cell_id, {})[task] = None
    return cells.assign(
        tasks=pd.Series({cell_id: "+".join(one) for cell_id, one in tasks.items()}, dtype=object),
        error="",
        place=pd.Series(places),
        status="done",
    )


def _failures(
    results_dir: Path, finished: set[str], configs: dict[str, Any], provenance: dict[str, Any], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Cells that failed and were not finished since."""
    folder = results_dir / FAILED
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        cell_id = place.name.rpartition("_")[2]
        if cell_id in finished or place.name.startswith("."):
            continue
        try:
            config = read_config(_TOP_KEY.split((place / CONFIG).read_text()))
            parse_pattern(config.get("pattern", "dense"))
            provenance[cell_id] = json.loads((place / PROVENANCE).read_bytes())
        except (OSError, ValueError, InputError) as error:
            problems.append(f"failure {place.name}: {type(error).__name__}: {error}")
            continue
        configs[cell_id] = config
        yield {"cell_id": cell_id, "place": place, "status": "failed", "error": str(provenance[cell_id].get("error", "")), **fields_of(config)}  # fmt: skip


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a table, of a cell that has a config only."""
    model, criterion = config.get("model") or {}, config.get("criterion") or {}
    name = Path(str(model["path"])).name if model.get("path") and not model.get("keep_name") else model.get("name", "")
    return {
        "model": str(name), "revision": "", "operand": "", "pattern": str(config.get("pattern", "dense")),
        "criterion": str(criterion.get("name", "none")), "mitigation": str(config.get("mitigation", "none")),
        "targets": str(config.get("targets") or "none"), "scope": str(config.get("scope", "all")),
        "profile": str(config.get("profile", "strict")), "dtype": str(config.get("dtype", "")), "seed": config.get("seed", 0),
        "tasks": "+".join(sorted(config.get("tasks") or ())), "dense_cell_id": "",
    }  # fmt: skip


def variants(cells: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> pd.Series:
    """For cells that no field tells apart, the settings that do (``eval.limit=32``); empty for the others."""
    found = dict.fromkeys(cells.index, "")
    numbers = cells.groupby([*FIELDS, "tasks"], sort=False, dropna=False).ngroup()
    groups: dict[int, list[str]] = {}
    for cell_id, number in zip(cells.index, numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(cell_id)
    for same in groups.values():
        if len(same) < 2:
            continue
        flat = {cell_id: dict(_flat(one)) for cell_id, one in zip(same, _not_shared(same, configs), strict=True)}
        keys = sorted({key for one in flat.values() for key in one})
        differing = [key for key in keys if len({str(one.get(key)) for one in flat.values()}) > 1]
        for cell_id, one in flat.items():
            found[cell_id] = ", ".join(f"{key}={one.get(key)}" for key in differing) or str(cell_id)
    return pd.Series(found, dtype=object)


def _not_shared(cells: Iterable[str], configs: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Configs without what is one object in all of them, as a block that `read_config` parsed once is."""
    found = [configs.get(cell, {}) for cell in cells]
    keys = [key for key in dict.fromkeys(chain(*found)) if len({id(one.get(key)) for one in found}) > 1]
    return [{key: one[key] for key in keys if key in one} for one in found]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in _NOT_A_SETTING:
            yield f"{prefix}{key}", value
