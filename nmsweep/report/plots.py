"""The plots of a report."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

mpl.use("Agg")  # files only: a cluster node has no display
import matplotlib.pyplot as plt

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart by colour-blind readers."""

_MARKERS = "osD^vPX"


def plot_drops(summary: pd.DataFrame, folder: Path) -> list[Path]:
    """Mean drop, and the perplexity's ratio, against the pattern: one figure for mini data and one for real data.

    Args:
        summary: of `summary_table`, in the order in which patterns stand on the axis.
        folder: where ``drop_<data>.svg`` and ``.png`` are written.
    """
    files: list[Path] = []
    for data, rows in summary[summary["pattern"] != "dense"].groupby("data", sort=False):
        panels = [
            (column, label)
            for column, label in (("drop", "mean drop (points)"), ("ratio", "perplexity / dense"))
            if column in rows and rows[column].notna().any()
        ]
        if not panels:
            continue
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False, layout="constrained"
        )
        for axis, (column, label) in zip(axes[0], panels, strict=True):
            _panel(axis, rows, column, label)
        axes[0][0].legend(fontsize=7, frameon=False)
        for suffix in ("svg", "png"):
            files.append(folder / f"drop_{data}.{suffix}")
            figure.savefig(files[-1], dpi=200)
        plt.close(figure)
    return files


def _panel(axis: Axes, rows: pd.DataFrame, column: str, label: str) -> None:
    patterns = list(dict.fromkeys(rows["pattern"]))
    many_models = rows["model"].nunique() > 1
    series = rows.groupby(["model", "criterion", "mitigation"], sort=False)
    for number, ((model, criterion, mitigation), line) in enumerate(series):
        positions = [patterns.index(pattern) for pattern in line["pattern"]]
        values = line[column] * (100 if column == "drop" else 1)
        name = f"{criterion}, {mitigation}" + (f", {model}" if many_models else "")
        axis.plot(
            positions,
            values,
            marker=_MARKERS[number % 7],
            color=_COLOURS[number % 7],
            markersize=5,
            linewidth=1,
            label=name,
        )
    axis.set_xticks(range(len(patterns)), patterns)
    axis.set_ylabel(label)
    axis.grid(axis="y", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
