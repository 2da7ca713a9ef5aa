"""`nmsweep report --compare A B`: the numbers that differ between two results folders, and which of them by more than noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from nmsweep.report.show.formats import plain
from nmsweep.results.layout import SAMPLES
from nmsweep.results.read import FIELDS, Results, read_results
from nmsweep.results.samples import read_groups
from nmsweep.results.tidy import PERPLEXITY, primary
from nmsweep.statistics.comparison import compare_cells, holm_by_task
from nmsweep.statistics.intervals import LEVEL

_MOST_ROWS = 60
_KEY = [*[name for name in FIELDS if name != "revision"], "variant"]


@dataclass(frozen=True)
class Contrast:
    """Two results folders side by side.

    Attributes:
        rows: one row for each cell and task that both have: fields, `task`, `metric`, `a`, `b`, `change` (b − a; for
            perplexity b / a), `low`, `high`, `p_holm`, and `verdict`: ``same``, ``noise``, ``beyond noise`` or
            ``other items``.
        only_a, only_b: ids of cells that the other folder lacks.
        problems: records that could not be read.
    """

    rows: pd.DataFrame
    only_a: Sequence[str]
    only_b: Sequence[str]
    problems: Sequence[str]


def contrast(folder_a: Path, folder_b: Path) -> Contrast:
    """Compare the cells of two folders, paired by item.

    Cells are matched by id; the others by their fields, since another version of the code gives other ids.

    Raises:
        InputError: one of them has no finished cell.
    """
    a, b = read_results(folder_a), read_results(folder_b)
    problems = [*a.problems, *b.problems]
    matched = _matched(a, b)
    rows = _values(a, b, matched)
    sides = zip(rows["cell_a"], rows["cell_b"], rows["task"], strict=True)
    rows["same_data"] = [_data(a, first, task) == _data(b, second, task) for first, second, task in sides]
    differing = rows[(rows["a"] != rows["b"]) & rows["same_data"]]
    rows = rows.merge(_intervals(a, b, differing, problems), on=["cell_b", "task", "metric"], how="left")
    rows["verdict"] = [_verdict(row) for _, row in rows.iterrows()]
    return Contrast(
        rows,
        sorted(set(a.done.index) - {pair[0] for pair in matched}),
        sorted(set(b.done.index) - {pair[1] for pair in matched}),
        problems,
    )


def _matched(a: Results, b: Results) -> list[tuple[str, str]]:
    same = [str(cell) for cell in a.done.index if cell in b.done.index]
    rest_a, rest_b = (
        results.done.drop(index=same)[_KEY].drop_duplicates(keep=False).rename_axis("cell").reset_index()
        for results in (a, b)
    )
    by_fields = rest_a.merge(rest_b, on=_KEY, suffixes=("_a", "_b"))
    return [(cell, cell) for cell in same] + list(zip(by_fields["cell_a"], by_fields["cell_b"], strict=True))


def _values(a: Results, b: Results, matched: Sequence[tuple[str, str]]) -> pd.DataFrame:
    pairs = pd.DataFrame(matched, columns=["cell_a", "cell_b"])
    columns = ["cell_id", "task", "metric", "value"]
    left = primary(a.tidy)[columns].rename(columns={"cell_id": "cell_a", "value": "a"})
    right = primary(b.tidy)[columns].rename(columns={"cell_id": "cell_b", "value": "b"})
    rows = pairs.merge(left, on="cell_a").merge(right, on=["cell_b", "task", "metric"])
    text = rows["metric"] == PERPLEXITY
    rows["change"] = np.where(text, rows["b"] / rows["a"], rows["b"] - rows["a"])
    return rows.join(b.done[list(FIELDS)], on="cell_b")


def _data(results: Results, cell: str, task: str) -> tuple[Any, Any]:
    """Fingerprint and version of a task's data: where they are equal, items with the same number are the same item."""
    known = (results.provenance[cell].get("tasks") or {}).get(task, {})
    return known.get("data"), known.get("version")


def _intervals(a: Results, b: Results, rows: pd.DataFrame, problems: list[str]) -> pd.DataFrame:
    """Interval of the change and Holm's p of cells that answered the same items; by `cell_b`, `task`, `metric`."""
    files = {
        f"{side} {cell}": results.done["place"][cell] / SAMPLES
        for side, results in (("a", a), ("b", b))
        for cell in rows[f"cell_{side}"].unique()
    }
    before = dict(zip("b " + rows["cell_b"], "a " + rows["cell_a"], strict=True))
    metrics = {str(task): list(names.unique()) for task, names in rows.groupby("task")["metric"]}
    table = compare_cells(read_groups(files, problems), before, metrics)
    ratio = table["metric"] == PERPLEXITY
    return pd.DataFrame(
        {
            "cell_b": table["cell_id"].map(lambda cell: cell.removeprefix("b ")), "task": table["task"], "metric": table["metric"],
            "low": table["ratio_low"].where(ratio, -table["drop_high"]),
            "high": table["ratio_high"].where(ratio, -table["drop_low"]),
            "p_holm": holm_by_task(table),
        }
    )  # fmt: skip


def _verdict(row: pd.Series) -> str:
    """Decide by the adjusted test where there is one, else by the interval."""
    if not row["same_data"]:
        return "other items"
    if row["a"] == row["b"]:
        return "same"
    if pd.isna(row["low"]):
        return "other items"
    if not pd.isna(row["p_holm"]):
        return "beyond noise" if row["p_holm"] < 1 - LEVEL else "noise"
    nothing = 1.0 if row["metric"] == PERPLEXITY else 0.0
    return "noise" if row["low"] <= nothing <= row["high"] else "beyond noise"


def show_contrast(out: Console, difference: Contrast, first: Path, second: Path) -> None:
    """Print the differences, those beyond noise first."""
    counts = ", ".join(f"{n} {name}" for name, n in difference.rows["verdict"].value_counts().items())
    lines = [f"A = {first}, B = {second}", f"{counts} (numbers: cell × task, primary metric)"]
    for name, ids in (("A", difference.only_a), ("B", difference.only_b)):
        if ids:
            lines.append(f"only in {name}: {len(ids)} cells ({', '.join(ids[:8])}{', …' if len(ids) > 8 else ''})")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    for verdict in ("beyond noise", "other items", "noise"):
        rows = difference.rows[difference.rows["verdict"] == verdict]
        if len(rows):
            out.print(_table(verdict, rows.head(_MOST_ROWS)))
            if len(rows) > _MOST_ROWS:
                out.print(f"… {len(rows) - _MOST_ROWS} more", highlight=False)
    for problem in difference.problems:
        out.print(f"warning: {plain(problem)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _table(verdict: str, rows: pd.DataFrame) -> RichTable:
    table = RichTable(title=verdict, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("cell", "task", "metric"):
        table.add_column(name)
    for name in ("A", "B", "change", "95 % interval", "Holm p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        name = " ".join(plain(row[field]) for field in ("model", "pattern", "criterion", "mitigation"))
        sign = "×" if row["metric"] == PERPLEXITY else ""
        ends = "–" if pd.isna(row["low"]) else f"[{row['low']:.4g}, {row['high']:.4g}]"
        p = "–" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.2g}"
        table.add_row(escape(f"{name} ({row['cell_b']})"), row['task'], row['metric'], f"{row['a']:.4g}", f"{row['b']:.4g}", f"{sign}{row['change']:{'' if sign else '+'}.4g}", escape(ends), p)  # fmt: skip
    return table
