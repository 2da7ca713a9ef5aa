"""Output error by layer: one table for each file that `nmsweep sensitivity` left in the results folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nmsweep.report.numbers.quantities import Quantity
from nmsweep.report.show.spec import MISSING, Entry, Table, TableSpec
from nmsweep.results.layout import SENSITIVITY

ERROR = Quantity("error", "relative output error", "relative_error", "", "", "lower", 1, False, 3)
DATA = "layers"
"""Folder of its tables and figures: they are measured on a calibration text, neither mini nor real."""

_COLUMNS = {"block", "projection", "relative_error", "pattern", "criterion", "mitigation"}


@dataclass(frozen=True)
class Sensitivity:
    """One table of `nmsweep sensitivity`: its file's name without suffix, and its rows."""

    name: str
    rows: pd.DataFrame


def read_sensitivities(results_dir: Path, problems: list[str]) -> list[Sensitivity]:
    """Read all of them, sorted by name; one that cannot be read is a problem."""
    sensitivities = []
    for file in sorted((results_dir / SENSITIVITY).glob("*.csv")):
        try:
            rows = pd.read_csv(file, keep_default_na=False)
            if not set(rows) >= _COLUMNS or not len(rows):
                raise ValueError(f"has no {', '.join(sorted(_COLUMNS - set(rows))) or 'rows'}")
            sensitivities.append(Sensitivity(file.stem, rows.astype({"relative_error": float, "block": int})))
        except (OSError, ValueError) as error:
            problems.append(f"sensitivity {file.name}: {error}; run `nmsweep sensitivity` again")
    return sensitivities


def layer_tables(sensitivities: Sequence[Sensitivity]) -> list[Table]:
    """Return tables of blocks by projections, in the order they run; the least sensitive block of a projection is bold."""
    tables = []
    for sensitivity in sensitivities:
        least = sensitivity.rows.groupby("projection")["relative_error"].min()
        entries = {
            (row["block"], row["projection"]): Entry(row["relative_error"], status="done", best=row["relative_error"] == least[row["projection"]])
            for row in sensitivity.rows.to_dict("records")
        }  # fmt: skip
        blocks, projections = (
            sorted(sensitivity.rows["block"].unique()),
            list(dict.fromkeys(sensitivity.rows["projection"])),
        )
        frame = pd.DataFrame(
            [[entries.get((block, name), MISSING) for name in projections] for block in blocks],
            index=pd.MultiIndex.from_tuples([(block,) for block in blocks], names=["block"]),
            columns=pd.MultiIndex.from_tuples([(name,) for name in projections], names=["projection"]),
            dtype=object,
        )
        spec = TableSpec(
            sensitivity.name, "Output error by layer, each pruned alone", ("block",), ("projection",), "error"
        )
        constants = {name: str(sensitivity.rows[name].iloc[0]) for name in ("pattern", "criterion", "mitigation")}
        tables.append(Table(spec, ERROR, DATA, (), {"file": sensitivity.name, **constants}, frame))
    return tables
