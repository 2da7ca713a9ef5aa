"""Results on the terminal."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.numbers.scores import Scores, by_cell
from nmsweep.report.show.formats import number, plain, span
from nmsweep.report.show.spec import in_order
from nmsweep.results.read import FIELDS, Results

_MOST_ROWS = 60


def show_results(out: Console, results: Results, scores: Scores) -> None:
    """Print one table for mini and one for real data: mean drops with their intervals, failures last."""
    for data in ("real", "mini"):
        rows = in_order(by_cell(results, scores, data))
        if len(rows):
            out.print(_table(data, rows))
            if len(rows) > _MOST_ROWS:
                out.print(f"… {len(rows) - _MOST_ROWS} more cells: see index.html", highlight=False)
    failed = results.cells[results.cells["status"] == "failed"]
    for cell in failed.head(10).reset_index(names="cell_id").to_dict("records"):
        name = " ".join(str(cell[field]) for field in ("model", "pattern", "criterion", "mitigation"))
        out.print(
            f"[red]failed[/red] {cell['cell_id']} {escape(plain(name))}: {escape(plain(cell['error']))}",
            highlight=False,
        )
    if len(failed) > 10:
        out.print(f"… {len(failed) - 10} more failures", highlight=False)


def _table(data: str, rows: pd.DataFrame) -> RichTable:
    sparse = rows[rows["pattern"] != "dense"]
    fields = [name for name in (*FIELDS, "variant") if name not in ("revision", "operand")]
    shown = [name for name in fields if name == "pattern" or (sparse if len(sparse) else rows)[name].nunique() > 1]
    constants = [
        f"{name} {rows[name].iloc[-1]}" for name in ("model", "criterion", "dtype", "seed") if name not in shown
    ]
    title = f"{data} tasks" + "".join(f", {plain(word)}" for word in constants)
    table = RichTable(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        longest = max(len(plain(value)) for value in rows[name].head(_MOST_ROWS))
        table.add_column(name, overflow="fold", min_width=min(longest, 16))
    columns = [
        (title, QUANTITIES[name])
        for title, name in (
            ("accuracy %", "accuracy"), ("drop, points", "drop"), ("relative drop %", "relative"),
            ("perplexity", "perplexity"), ("ratio", "ratio"), ("KL", "kl"),
        )
        if rows[name].notna().any()
    ]  # fmt: skip
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows.head(_MOST_ROWS).to_dict("records"):
        table.add_row(
            *[escape(plain(row[name])) for name in shown], *[_value(row, quantity) for _, quantity in columns]
        )
    return table


def _value(row: Mapping[Hashable, Any], quantity: Quantity) -> str:
    if pd.isna(row[quantity.name]):
        return "–"
    text = number(row[quantity.name], quantity)
    if not quantity.low:
        return text
    return f"{text} [dim]{span(row[f'{quantity.name}_low'], row[f'{quantity.name}_high'], quantity)}[/dim]"
