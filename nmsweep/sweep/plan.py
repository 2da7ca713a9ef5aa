"""The cells of a command with their identities, in the order that reuses most, and the file that keeps them.

Composing and identifying a cell takes milliseconds, so it is done once: the processes that run the cells, and `nmsweep status`,
read ``<results>/.plans/<plan_id>.json``. A plan's id is the hash of its content.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nmsweep.config.schema import RunConfig, from_plain, short_hash
from nmsweep.errors import InputError
from nmsweep.results.layout import PLANS, plan_file
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
        cell_id, part_id, dense_cell_id, calibration_id: as in `cell.identity.Cell`.
        model_key: equal for cells that can share a loaded model.
        baseline: a dense cell that was not asked for, but that others are compared with.
        config: for `config.schema.from_plain`, without the results folder.
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
        words: of the command.
        cells: all of them, missing or not.
        results_dir: the results folder; not stored, since a folder may be moved.
    """

    words: tuple[str, ...]
    cells: tuple[PlannedCell, ...]
    results_dir: Path

    @cached_property
    def plan_id(self) -> str:
        return short_hash(self.content(), 20)

    def config(self, cell: PlannedCell) -> RunConfig:
        """Return the config of one of its cells.

        Raises:
            InputError: it is no config of this version, or names a class that it may not.
        """
        return from_plain({**cell.config, "results_dir": self.results_dir})

    def content(self) -> dict[str, Any]:
        """Return the plan as JSON, with what all cells' configs have in common written once."""
        configs = [cell.config for cell in self.cells]
        common = {
            key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)
        }
        cells = []
        for cell in self.cells:
            rest = {key: value for key, value in cell.config.items() if key not in common}
            cells.append({**vars(cell), "config": rest})
        return {"schema": SCHEMA, "words": list(self.words), "common": common, "cells": cells}


@dataclass(frozen=True)
class Batch:
    """Cells of a stored plan that one job runs.

    Attributes:
        results_dir: the results folder.
        plan_id: the plan, read from there.
        launch_id: the launch that the job belongs to.
        indices: of the plan's cells.
        log_dir: folder for the job's log.
        worker, n_workers: number of this process among those that share one machine; 0 of 1 where it has the machine to itself.
    """

    results_dir: Path
    plan_id: str
    launch_id: str
    indices: tuple[int, ...]
    log_dir: Path
    worker: int = 0
    n_workers: int = 1


def ordered(cells: Iterable[PlannedCell]) -> list[PlannedCell]:
    """Sort cells so that most is reused: by model, its dense cells first, then by calibration; otherwise as given."""
    cells = list(cells)
    models = {key: at for at, key in enumerate(dict.fromkeys(cell.model_key for cell in cells))}
    states = {key: at for at, key in enumerate(dict.fromkeys(["", *(cell.calibration_id for cell in cells)]))}
    return sorted(
        cells,
        key=lambda cell: (models[cell.model_key], cell.cell_id != cell.dense_cell_id, states[cell.calibration_id]),
    )


def store(plan: Plan, *, latest: bool = True) -> Path:
    """Write a plan's file.

    Args:
        plan: the plan.
        latest: whether a plan that is stored already becomes the latest again.

    Raises:
        StorageError: the folder cannot be written.
    """
    place = plan_file(plan.results_dir, plan.plan_id)
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
        InputError: no plan has this id, or its content has another.
    """
    place = plan_file(results_dir, plan_id)
    if not _PLAN_ID.fullmatch(plan_id) or not place.is_file():
        allowed = ", ".join(plan_ids(results_dir)) or "none; run a sweep first"
        raise InputError(f"plan: {plan_id!r} is no plan of {results_dir}; there is {allowed}")
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
    """Return the ids of the plans in a results folder, the latest first."""
    try:
        files = [p for p in (results_dir / PLANS).iterdir() if p.suffix == ".json" and _PLAN_ID.fullmatch(p.stem)]
        return [file.stem for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]
    except FileNotFoundError:
        return []
