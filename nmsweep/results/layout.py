"""The layout of a results folder: every name in it, written once.

```
results/cells/<name>_<cell_id>/       one finished cell: the files CELL_FILES
        items/<task>_<data>.parquet   the text of a task's items, once per data set
        tidy.csv  report/             what `nmsweep report` writes
        failed/<name>_<cell_id>/      a failed cell: its config, its provenance with the error
        quarantine/                   damaged cells, parts and files, moved aside
        recipes/  sensitivity/        patterns per layer (policy=greedy); tables of `nmsweep sensitivity`
        .parts/<part_id>/<task>/      a finished task: PART and SAMPLES
        .calibration/                 calibrated states, shared by cells
        .claims/<name>.<generation>   leases on cells and states
        .plans/<plan_id>.json         the cells of a sweep
        .runs/<time>/                 logs, and submitit's files
```
"""

from pathlib import Path

CELLS = "cells"
ITEMS = "items"
TIDY = "tidy.csv"
REPORT = "report"
FAILED = "failed"
QUARANTINE = "quarantine"
RECIPES = "recipes"
SENSITIVITY = "sensitivity"
PARTS = ".parts"
CALIBRATION = ".calibration"
CLAIMS = ".claims"
PLANS = ".plans"
RUNS = ".runs"

WRITTEN = (CELLS, ITEMS, REPORT, FAILED, RECIPES, PARTS, CALIBRATION, CLAIMS, PLANS)
"""Folders whose files and folders are written under a temporary name first."""

CONFIG = "config.yaml"
METRICS = "metrics.csv"
LAYERS = "layers.csv"
SAMPLES = "samples.parquet"
PROVENANCE = "provenance.json"
PART = "part.json"
LOG = "nmsweep.log"

CELL_FILES = (CONFIG, METRICS, LAYERS, SAMPLES, PROVENANCE)
"""Files of a finished cell; the last one lists the others with their sizes and digests."""

UNFINISHED = ".tmp_"
"""Prefix of a file or folder that is being written."""

REPLACED = ".old_"
"""Prefix of a folder that keeps what is being replaced."""


def failure_folder(results_dir: Path, name: str) -> Path:
    """Return the folder for the failure of a cell, given the name of the cell's folder."""
    return results_dir / FAILED / name


def items_file(results_dir: Path, task: str, data: str) -> Path:
    """Return the file of a task's items; `data` identifies them, as in a cell's ``provenance["tasks"][task]["data"]``."""
    return results_dir / ITEMS / f"{task}_{data[:12]}.parquet"


def plan_file(results_dir: Path, plan_id: str) -> Path:
    """Return the file of a plan."""
    return results_dir / PLANS / f"{plan_id}.json"
