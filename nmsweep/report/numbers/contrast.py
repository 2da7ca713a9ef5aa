"""`nmsweep report --compare A B`: what differs between two results folders, and what of it is more than noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from nmsweep.report.numbers.samples import Samples, read_many
from nmsweep.report.show.formats import plain
from nmsweep.report.workers import Here
from nmsweep.results.layout import SAMPLES
from nmsweep.results.read import FIELDS, Results, read_results
from nmsweep.results.tidy import PERPLEXITY, primary
from nmsweep.statistics.changes import Pair
from nmsweep.statistics.paired import paired
from nmsweep.statistics.statistics import LEVEL

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


def contrast(first: Path, second: Path) -> Contrast:
    """Compare the cells of two folders, paired by item.

    Cells are matched by id; those that are left (another version of the code gives another id) by their fields.

    Raises:
        InputError: one of them has no finished cell.
    """
    a, b = read_results(first), read_results(second)
    problems = [*a.problems, *b.problems]
    matched = _matched(a, b)
    rows = _values(a, b, matched)
    rows["same_data"] = [_same_data(a, b, row["cell_a"], row["cell_b"], row["task"]) for row in rows.to_dict("records")]
    differing = rows[(rows["a"] != rows["b"]) & rows["same_data"]]
    rows = rows.merge(_paired(a, b, differing, problems), on=["cell_b", "task", "metric"], how="left")
    rows["verdict"] = [_verdict(row) for _, row in rows.iterrows()]
    return Contrast(
        rows,
        sorted(set(a.done.index) - {pair[0] for pair in matched}),
        sorted(set(b.done.index) - {pair[1] for pair in matched}),
        problems,
    )


def _matched(a: Results, b: Results) -> list[tuple[str, str]]:
    same = [(str(cell), str(cell)) for cell in a.done.index if cell in b.done.index]
    rest_a, rest_b = (results.done.drop(index=[pair[0] for pair in same]) for results in (a, b))
    by_key = {tuple(row): str(cell) for cell, *row in rest_b[_KEY].itertuples(name=None) if _unique(rest_b, row)}
    return same + [
        (str(cell), by_key[tuple(row)])
        for cell, *row in rest_a[_KEY].itertuples(name=None)
        if tuple(row) in by_key and _unique(rest_a, row)
    ]


def _unique(cells: pd.DataFrame, row: Sequence[object]) -> bool:
    return int((cells[_KEY] == list(row)).all(axis=1).sum()) == 1


def _values(a: Results, b: Results, matched: Sequence[tuple[str, str]]) -> pd.DataFrame:
    pairs = pd.DataFrame(matched, columns=["cell_a", "cell_b"])
    columns = ["cell_id", "task", "metric", "value"]
    left = primary(a.tidy)[columns].rename(columns={"cell_id": "cell_a", "value": "a"})
    right = primary(b.tidy)[columns].rename(columns={"cell_id": "cell_b", "value": "b"})
    rows = pairs.merge(left, on="cell_a").merge(right, on=["cell_b", "task", "metric"])
    text = rows["metric"] == PERPLEXITY
    rows["change"] = np.where(text, rows["b"] / rows["a"], rows["b"] - rows["a"])
    return rows.join(b.done[list(FIELDS)], on="cell_b")


def _same_data(a: Results, b: Results, cell_a: str, cell_b: str, task: str) -> bool:
    """Whether both cells saw the same data: then items of one number are one item."""
    seen = [
        (known.get("data"), known.get("version"))
        for results, cell in ((a, cell_a), (b, cell_b))
        for known in [(results.provenance[cell].get("tasks") or {}).get(task, {})]
    ]
    return seen[0] == seen[1]


def _paired(a: Results, b: Results, rows: pd.DataFrame, problems: list[str]) -> pd.DataFrame:
    samples: dict[str, Samples] = {}
    for prefix, results, column in (("a ", a, "cell_a"), ("b ", b, "cell_b")):
        files = {str(cell): results.done["place"][cell] / SAMPLES for cell in dict.fromkeys(rows[column])}
        samples |= {prefix + cell: one for cell, one in read_many(files, files, problems, Here()).items()}
    pairs = [Pair("a " + x, "b " + y) for x, y in dict.fromkeys(zip(rows["cell_a"], rows["cell_b"], strict=True))]
    metrics = {str(task): list(dict.fromkeys(names)) for task, names in rows.groupby("task")["metric"]}
    found = paired(samples, pairs, metrics).table
    table = pd.DataFrame({"cell_b": found["second"].str[2:], "task": found["task"], "metric": found["metric"]})
    ends = {"low": ("drop_high", "ratio_low", -1), "high": ("drop_low", "ratio_high", -1)}
    for name, (drop, ratio, sign) in ends.items():
        empty = pd.Series(np.nan, index=found.index)
        table[name] = (sign * found.get(drop, empty)).fillna(found.get(ratio, empty))
    table["p_holm"] = found.get("p_holm", pd.Series(np.nan, index=found.index))
    return table


def _verdict(row: pd.Series) -> str:
    """The adjusted test decides where there is one, else the interval."""
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


def show_contrast(out: Console, found: Contrast, first: Path, second: Path) -> None:
    """Print what differs."""
    counts = found.rows["verdict"].value_counts()
    out.print(f"A = {first}, B = {second}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        ", ".join(f"{n} {name}" for name, n in counts.items()) + " (numbers: cell × task, primary metric)",
        highlight=False,
    )
    for name, ids in (("A", found.only_a), ("B", found.only_b)):
        if ids:
            out.print(
                f"only in {name}: {len(ids)} cells ({', '.join(ids[:8])}{', …' if len(ids) > 8 else ''})",
                highlight=False,
                soft_wrap=True,
            )
    for verdict in ("beyond noise", "other items", "noise"):
        rows = found.rows[found.rows["verdict"] == verdict]
        if len(rows):
            out.print(_table(verdict, rows.head(_MOST_ROWS)))
            if len(rows) > _MOST_ROWS:
                out.print(f"… {len(rows) - _MOST_ROWS} more", highlight=False)
    for problem in found.problems:
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
