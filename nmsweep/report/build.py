"""`nmsweep report`: write `tidy.csv`, the tables and the plot of a results folder."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from nmsweep.pattern import parse_pattern
from nmsweep.record import write_text
from nmsweep.report.plots import plot_drops
from nmsweep.report.tidy import PERPLEXITY, averages, drops, primary, read_tidy

_CELL = ["model", "pattern", "criterion", "mitigation"]


def make_report(results_dir: Path, console: Console | None = None) -> None:
    """Write everything a results folder can be shown as, and print the main table.

    Raises:
        InputError: there is nothing to report, or a record cannot be read.
    """
    out = console or Console()
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a pipe has no width of its own
    tidy = read_tidy(results_dir)
    write_text(results_dir / "tidy.csv", tidy.to_csv(index=False))
    folder = results_dir / "report"
    folder.mkdir(exist_ok=True)
    chosen = primary(tidy)
    summary = summary_table(chosen)
    write_text(folder / "summary.md", _markdown(tidy, chosen, summary))
    plots = plot_drops(summary, folder)
    for name, rows in summary.groupby("data", sort=False):
        out.print(_terminal(str(name), rows))
    for file in (results_dir / "tidy.csv", folder / "summary.md", *plots):
        out.print(str(file), soft_wrap=True, highlight=False)


def summary_table(chosen: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: each task's primary number, mean drops against dense, and the perplexity's ratio.

    Mini data and real data are never in one row's means: a cell with both has two rows.
    """
    chosen = chosen.assign(data=["mini" if task.startswith("mini_") else "real" for task in chosen["task"]])
    tables = []
    for data, rows in chosen.groupby("data", sort=False):
        wide = rows.pivot(index="cell_id", columns="task", values="value")
        first = rows.drop_duplicates("cell_id").set_index("cell_id")[[*_CELL, "sparsity", "n_items"]]
        means = averages(drops(rows)).set_index("cell_id") if (rows["pattern"] != "dense").any() else pd.DataFrame()
        tables.append(first.drop(columns="n_items").join(means).join(wide).assign(data=data))
    table = pd.concat(tables).reset_index()
    table["_order"] = [_strictness(pattern) for pattern in table["pattern"]]
    return (
        table.sort_values(["data", "model", "_order", "criterion", "mitigation"])
        .drop(columns="_order")
        .reset_index(drop=True)
    )


def _strictness(pattern: str) -> tuple[float, int]:
    """Dense first, then by sparsity, larger groups first."""
    parsed = parse_pattern(pattern)
    return (-1.0, 0) if parsed.is_dense else (parsed.sparsity, -parsed.m)


def _tasks(rows: pd.DataFrame) -> list[str]:
    known = {*_CELL, "cell_id", "sparsity", "drop", "relative_drop", "n_tasks", "ratio", "data"}
    return [column for column in rows.columns if column not in known and rows[column].notna().any()]


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as people read them."""
    shown = rows[_CELL].copy()
    for task in sorted(_tasks(rows)):
        shown[task] = [_number(value, percent=not _is_text(task)) for value in rows[task]]
    for column, title in (("drop", "mean drop"), ("relative_drop", "relative")):
        if column in rows:
            shown[title] = [
                _number(value, percent=True) + ("" if pd.isna(value) else " %" if column == "relative_drop" else "")
                for value in rows[column]
            ]
    if "ratio" in rows:
        shown["ppl ratio"] = [_number(value, percent=False) for value in rows["ratio"]]
    return shown


def _is_text(task: str) -> bool:
    return task in ("wikitext2", "mini_prose")


def _number(value: float, percent: bool) -> str:
    if pd.isna(value):
        return "–"
    return f"{100 * value:.1f}" if percent else f"{value:.2f}"


def _markdown(tidy: pd.DataFrame, chosen: pd.DataFrame, summary: pd.DataFrame) -> str:
    lines = [
        "# Summary",
        "",
        "Accuracies in percent; drops (points, and relative to dense) against the dense cell of the same model; perplexity is never part of a mean.",
        "",
    ]
    for data, rows in summary.groupby("data", sort=False):
        note = " (shipped mini tasks: not comparable with published numbers)" if data == "mini" else ""
        lines += [f"## {data}{note}", "", _shown(rows).map(_escape).to_markdown(index=False, disable_numparse=True), ""]
    pairs = drops(chosen)
    if len(pairs):
        lines += ["## Per task", "", _per_task(pairs).map(_escape).to_markdown(index=False, disable_numparse=True), ""]
    return "\n".join(lines)


def _per_task(pairs: pd.DataFrame) -> pd.DataFrame:
    text = pairs["metric"] == PERPLEXITY
    return pd.DataFrame(
        {
            **{column: pairs[column] for column in _CELL},
            "task": pairs["task"],
            "metric": pairs["metric"],
            "dense": [_number(v, percent=not t) for v, t in zip(pairs["dense"], text, strict=True)],
            "sparse": [_number(v, percent=not t) for v, t in zip(pairs["value"], text, strict=True)],
            "drop (points)": [_number(v, percent=True) for v in pairs["drop"]],
            "relative drop (%)": [_number(v, percent=True) for v in pairs["relative_drop"]],
            "ratio": [_number(v, percent=False) for v in pairs["ratio"]],
        }
    )


def _escape(value: object) -> str:
    """Text that breaks no Markdown table."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _terminal(data: str, rows: pd.DataFrame) -> Table:
    """The main table for a terminal: what all rows share stands in the title."""
    shown = _shown(rows)
    sparse = rows[rows["pattern"] != "dense"]
    constant = [
        column for column in _CELL if column != "pattern" and (sparse if len(sparse) else rows)[column].nunique() == 1
    ]
    words = [str((sparse if len(sparse) else rows)[column].iloc[0]) for column in constant if column != "mitigation"]
    table = Table(title=", ".join([f"{data} tasks", *words]), title_justify="left", show_edge=False, pad_edge=False)
    for column in shown.columns.drop(constant):
        table.add_column(column.removeprefix("mini_"), justify="left" if column in _CELL else "right", overflow="fold")
    for row in shown.drop(columns=constant).itertuples(index=False):
        table.add_row(*[str(value).replace("[", "\\[") for value in row])
    return table
