"""The cells of a command, worked out once: their identities, an order that reuses most, and the file that keeps them.

Composing a cell costs milliseconds and its identity more, so neither is done again by the processes that run the cells, nor
by `nmsweep status`: they read `<results>/.plans/<plan_id>.json`. A plan's id is the hash of its content.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nmsweep.config.schema import RunConfig, from_plain, short_hash
from nmsweep.errors import InputError
from nmsweep.results.storage import write_text

SCHEMA = 1
"""Version of a plan's file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_ID = re.compile(r"[0-9a-f]{12}")
_PLAN_ID = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class PlannedCell:
    """One cell of a plan.

    Attributes:
        name: of its folder.
        cell_id, part_id, dense_cell_id, calibration_id: as in `cell.Cell`.
        model_key: equal for cells that one loaded model serves.
        baseline: not asked for itself, but what other cells are compared with.
        config: of the cell, for `config.from_plain`, the results folder left out.
    """

    name: str
    cell_id: str
    part_id: str
    dense_cell_id: str
    calibration_id: str
    model_key: str
    baseline: bool
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """All cells of one command, in the order they are run.

    Attributes:
        words: of the command, for people.
        cells: what is to be there in the end, missing or not.
        results_dir: the results folder; not part of what is stored, since a folder may be moved.
    """

    words: tuple[str, ...]
    cells: tuple[PlannedCell, ...]
    results_dir: Path

    @cached_property
    def plan_id(self) -> str:
        return short_hash(self.content(), 20)

    def config(self, cell: PlannedCell) -> RunConfig:
        """The config of one of its cells.

        Raises:
            InputError: it is no config of this version, or names a class that it may not.
        """
        return from_plain({**cell.config, "results_dir": self.results_dir})

    def content(self) -> dict[str, Any]:
        """As JSON; what all cells' configs have in common stands there once."""
        configs = [cell.config for cell in self.cells]
        common = {key: value for key, value in configs[0].items() if all(one.get(key) == value for one in configs)}
        cells = []
        for cell in self.cells:
            own = {key: value for key, value in cell.config.items() if key not in common}
            cells.append({**vars(cell), "config": own})
        return {"schema": SCHEMA, "words": list(self.words), "common": common, "cells": cells}


def ordered(cells: Iterable[PlannedCell]) -> list[PlannedCell]:
    """The order that reuses most: model by model, its dense cells first, then calibration by calibration; else as given."""
    cells = list(cells)
    models = {key: at for at, key in enumerate(dict.fromkeys(cell.model_key for cell in cells))}
    states = {key: at for at, key in enumerate(dict.fromkeys(["", *(cell.calibration_id for cell in cells)]))}
    return sorted(
        cells,
        key=lambda cell: (models[cell.model_key], cell.cell_id != cell.dense_cell_id, states[cell.calibration_id]),
    )


def plans_folder(results_dir: Path) -> Path:
    return results_dir / ".plans"


def store(plan: Plan, *, latest: bool = True) -> Path:
    """Keep a plan.

    Args:
        plan: the plan.
        latest: whether one that is kept already, and whole, counts as the latest again.

    Raises:
        StorageError: the folder cannot be written.
    """
    place = plans_folder(plan.results_dir) / f"{plan.plan_id}.json"
    text = json.dumps(plan.content(), sort_keys=True) + "\n"
    if not _reads(place, text):
        write_text(place, text)
    elif latest:
        os.utime(place)
    return place


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


def load(results_dir: Path, plan_id: str) -> Plan:
    """Read a plan.

    Raises:
        InputError: there is none of this id, or its content is not what the id says.
    """
    place = plans_folder(results_dir) / f"{plan_id}.json"
    if not _PLAN_ID.fullmatch(plan_id) or not place.is_file():
        have = ", ".join(found) if (found := plan_ids(results_dir)) else "none; run a sweep first"
        raise InputError(f"plan: {plan_id!r} is no plan of {results_dir}; there is {have}")
    try:
        content = json.loads(place.read_text())
        plan = _from_content(content, results_dir)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"plan {place}: {type(error).__name__}: {error}; give the sweep's command again") from error
    if plan.plan_id != plan_id:
        raise InputError(f"plan {place}: its content is not what its name says; give the sweep's command again")
    return plan


def _from_content(content: Mapping[str, Any], results_dir: Path) -> Plan:
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
    common = content["common"]
    cells = [PlannedCell(**{**cell, "config": {**common, **cell["config"]}}) for cell in content["cells"]]
    for cell in cells:  # names become paths
        if not _NAME.fullmatch(cell.name) or not _ID.fullmatch(cell.cell_id) or not _ID.fullmatch(cell.part_id):
            raise ValueError(f"{cell.name!r} is no cell's name")
    return Plan(tuple(content["words"]), tuple(cells), results_dir)


def plan_ids(results_dir: Path) -> list[str]:
    """Ids of the plans kept in a results folder, the latest first."""
    try:
        files = [p for p in plans_folder(results_dir).iterdir() if p.suffix == ".json" and _PLAN_ID.fullmatch(p.stem)]
        return [file.stem for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]
    except FileNotFoundError:
        return []


def indices_text(indices: Sequence[int]) -> str:
    """Indices as one word, ``0-3_7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "_".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def parse_indices(text: str) -> list[int]:
    """The indices of ``0-3_7``."""
    found: list[int] = []
    for part in text.split("_"):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
