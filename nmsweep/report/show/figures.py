"""The figures of a report: only what the records hold; one that has nothing to show is skipped, with the reason said."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import kind_of, metadata_bits_of
from nmsweep.results.read import FIELDS, Results

FIGURES = {
    "drop_pattern": "Drop against pattern",
    "ratio_pattern": "Perplexity ratio against pattern",
    "criterion_mitigation": "Criteria and mitigations",
    "perplexity_density": "Perplexity against density",
    "drop_bits": "Drop against metadata bits",
    "pareto": "Quality against linear FLOPs",
    "layers": "Sparsity by layer",
}
"""Title by name."""


@dataclass(frozen=True)
class Figure:
    """A figure that was written: its name and title, its files, and what was left out for the sake of legibility."""

    name: str
    title: str
    data: str
    files: list[Path]
    note: str = ""


@dataclass
class Figures:
    """What was drawn, and why the rest was not: ``name (data): reason``."""

    made: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def draw_figures(cells: Mapping[str, pd.DataFrame], folder: Path, pool: Executor) -> Callable[[], Figures]:
    """Draw every figure for which there are numbers, as PDF and PNG.

    Args:
        cells: `points` by kind of data, mini and real.
        folder: where they are written, in a folder for each kind.
        pool: draws them.

    Returns:
        to be called for what was drawn; it waits for the drawing.
    """
    futures = [
        pool.submit(draw_figure, name, data, of_data, folder) for data, of_data in cells.items() for name in FIGURES
    ]

    def drawn() -> Figures:
        found = [future.result() for future in futures]
        return Figures(
            [one for one in found if isinstance(one, Figure)], [one for one in found if isinstance(one, str)]
        )

    return drawn


def draw_figure(name: str, data: str, cells: pd.DataFrame, folder: Path) -> Figure | str:
    """One figure, or why there is none."""
    from nmsweep.report.show.drawings import DRAWINGS, NothingToDraw  # matplotlib: often another process draws

    files: list[Path] = []
    try:
        note = DRAWINGS[name](cells, folder / data / name, files)
    except NothingToDraw as reason:
        return f"{name} ({data}): {reason}"
    return Figure(name, FIGURES[name], data, files, note)


def all_points(results: Results, scores: Scores) -> dict[str, pd.DataFrame]:
    """`points` of each kind of data that there is."""
    found = {data: points(results, scores, data) for data in ("real", "mini")}
    return {data: cells for data, cells in found.items() if len(cells)}


def points(results: Results, scores: Scores, data: str) -> pd.DataFrame:
    """One row a finished cell: its fields, the means over tasks with their ends, the text's numbers, and its densities."""
    of_data = scores.per_cell[scores.per_cell["data"] == data].set_index("cell_id")
    tasks = of_data[~of_data["is_text"]].drop(columns=["is_text", "data", "ratio", "ratio_low", "ratio_high"])
    text = of_data[of_data["is_text"]][["value", "ratio", "ratio_low", "ratio_high"]].rename(columns={"value": "perplexity"})  # fmt: skip
    cells = results.done[[*FIELDS, "variant", "sparsity", "flops_share", "place"]]
    cells = cells[cells.index.isin(of_data.index)].join(tasks.rename(columns={"value": "accuracy"})).join(text)
    cells["place"] = cells["place"].map(str)  # a path is slow to send to another process
    cells["density"] = 1 - cells["sparsity"]
    cells["flops_density"] = 1 - cells["flops_share"] * cells["sparsity"]
    cells["bits"] = [metadata_bits_of(pattern) for pattern in cells["pattern"]]
    cells["bits"] = cells["bits"].astype(float)
    cells["kind"] = [kind_of(pattern) for pattern in cells["pattern"]]
    return cells.sort_values("model", kind="stable")
