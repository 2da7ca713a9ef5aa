"""The figures of a report. One without numbers is left out, with the reason."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nmsweep.report.numbers.layers import DATA, Sensitivity
from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.numbers.scores import Scores, by_cell
from nmsweep.report.show.formats import plain
from nmsweep.report.show.spec import kind_of, order
from nmsweep.report.show.style import legend_below, look, panels
from nmsweep.results.read import Results

MOST_SERIES = 6
MOST_MODELS = 4


@dataclass(frozen=True)
class Figure:
    """A figure: its name and title, the kind of data, its files, and a note on what was left out for legibility."""

    name: str
    title: str
    data: str
    files: list[Path]
    note: str = ""


@dataclass
class Figures:
    """The figures drawn, and those left out: ``name (data): reason``."""

    drawn: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class NothingToDraw(Exception):  # noqa: N818 - not an error: the figure is left out
    """A figure has nothing to show; the message gives the reason."""


def draw_figures(results: Results, scores: Scores, layers: Sequence[Sensitivity], folder: Path) -> Figures:
    """Draw every figure that has numbers, as PDF and PNG.

    Args:
        results: the records.
        scores: their numbers.
        layers: the output errors by layer.
        folder: receives a folder for each kind of data.
    """
    figures = Figures()
    for data in ("real", "mini"):
        cells = by_cell(results, scores, data)
        for name, (title, draw) in _DRAWINGS.items() if len(cells) else ():
            try:
                figures.drawn.append(Figure(name, title, data, *draw(cells, folder / data / name)))
            except NothingToDraw as reason:
                figures.skipped.append(f"{name} ({data}): {reason}")
    if layers:
        figures.drawn.append(_layer_errors(layers, folder / DATA / "error"))
    else:
        figures.skipped.append("error (layers): no error by layer is recorded; `nmsweep sensitivity` measures it")
    return figures


_Drawn = tuple[list[Path], str]
"""The files of a figure, and a note on what was left out."""


def _by_model(cells: pd.DataFrame, place: Path, draw: Callable[[Axes, pd.DataFrame], str]) -> _Drawn:
    """Draw a panel for each of the models with most cells.

    Args:
        cells: those to show.
        place: the files' path without suffix.
        draw: draws the cells of one model; returns a note on what it left out.
    """
    names = list(cells["model"].value_counts().index)
    models = sorted(names[:MOST_MODELS])
    notes = [f"{len(names) - MOST_MODELS} more models left out"] if len(names) > MOST_MODELS else []
    with panels([plain(model) for model in models], place) as (files, axes):
        for axis, model in zip(axes, models, strict=True):
            notes.append(draw(axis, cells[cells["model"] == model]))
    return files, "; ".join(filter(None, dict.fromkeys(notes)))


def _with_number(cells: pd.DataFrame, column: str, why: str) -> pd.DataFrame:
    """The sparse cells that have a number."""
    known = cells[cells[column].notna() & (cells["pattern"] != "dense")]
    if not len(known):
        raise NothingToDraw(why)
    return known


def _series(cells: pd.DataFrame, column: str) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """Lines of one panel: `act` without mitigation first, then those with the smallest mean; a note on the rest."""
    names = [name for name in ("criterion", "mitigation", "targets", "scope", "profile", "dtype", "seed", "variant") if cells[name].nunique() > 1] or ["criterion"]  # fmt: skip
    other = (cells["criterion"] != "act") | (cells["mitigation"] != "none")
    grouped = cells.assign(_other=other).groupby(names, sort=False)
    rank = pd.DataFrame({"_other": grouped["_other"].any(), "_n": grouped.size(), "_mean": grouped[column].mean()})
    rank = rank.sort_values(["_other", "_n", "_mean"], ascending=[True, False, True], kind="stable")[:MOST_SERIES]
    keys = [key if isinstance(key, tuple) else (key,) for key in rank.index]
    lines = [
        (plain(", ".join(map(str, key))), cells.iloc[grouped.indices[key[0] if len(names) == 1 else key]])
        for key in keys
    ]
    rest = f"at most {MOST_SERIES} series per panel, the others are left out" if grouped.ngroups > MOST_SERIES else ""
    return lines, rest


def _error_bars(axis: Axes, x: Any, line: pd.DataFrame, quantity: Quantity, label: str, **style: Any) -> None:
    arms = None
    if line[f"{quantity.name}_low"].notna().any():
        value = line[quantity.name]
        lengths = np.stack([value - line[f"{quantity.name}_low"], line[f"{quantity.name}_high"] - value])
        arms = np.clip(np.nan_to_num(lengths), 0, None) * quantity.scale
    axis.errorbar(x, line[quantity.name] * quantity.scale, yerr=arms, label=label, capsize=1.5, elinewidth=0.6, **style)  # fmt: skip


def _finish(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    legend_below(axis)


def _against_pattern(quantity: Quantity) -> Callable[[pd.DataFrame, Path], _Drawn]:
    def draw(cells: pd.DataFrame, place: Path) -> _Drawn:
        known = _with_number(cells, quantity.name, f"no sparse cell has a {quantity.title}")
        known = known[known["pattern"].map(kind_of) != "policy"]
        if not len(known):
            raise NothingToDraw("each layer of every sparse cell has a pattern of its own")
        return _by_model(known, place, panel)

    def panel(axis: Axes, cells: pd.DataFrame) -> str:
        patterns = sorted(set(cells["pattern"]), key=lambda pattern: order("pattern", pattern))
        lines, rest = _series(cells, quantity.name)
        for number, (name, line) in enumerate(lines):
            line = line.assign(_x=line["pattern"].map(patterns.index)).sort_values("_x")
            shift = 0.06 * (number - (len(lines) - 1) / 2)  # side by side, so that no interval hides another
            _error_bars(axis, line["_x"] + shift, line, quantity, name, **look(number))
        axis.set_xticks(range(len(patterns)), patterns)
        _finish(axis, "pattern", quantity.title)
        return rest

    return draw


def _heat_map(cells: pd.DataFrame, place: Path) -> _Drawn:
    quantity = QUANTITIES["drop"] if cells["drop"].notna().any() else QUANTITIES["ratio"]
    known = _with_number(cells, quantity.name, "no sparse cell has a drop or a ratio")
    counts = known["pattern"].value_counts()
    if known["criterion"].nunique() < 2 or known["mitigation"].nunique() < 2:
        raise NothingToDraw("fewer than two criteria or two mitigations")
    pattern = "8:16" if counts.get("8:16", 0) == counts.max() else str(counts.index[0])
    known = known[known["pattern"] == pattern]
    values = known[quantity.name] * quantity.scale
    low, high = values.min(), values.max()

    def panel(axis: Axes, of_model: pd.DataFrame) -> str:
        grid = of_model.pivot_table(index="criterion", columns="mitigation", values=quantity.name, sort=False)
        grid = grid.loc[sorted(grid.index), sorted(grid.columns, key=lambda name: order("mitigation", name))]
        shown = grid.to_numpy(float) * quantity.scale
        axis.imshow(shown, cmap="cividis_r", aspect="auto", vmin=low, vmax=high)
        axis.grid(False)
        axis.set_xticks(range(grid.shape[1]), [plain(name) for name in grid.columns], rotation=40, ha="right", rotation_mode="anchor")  # fmt: skip
        axis.set_yticks(range(grid.shape[0]), [plain(name) for name in grid.index])
        for (row, column), value in np.ndenumerate(shown):
            text = "–" if np.isnan(value) else f"{value:.{quantity.digits}f}"
            colour = "white" if value > (low + high) / 2 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=5, color=colour)
        return ""

    files, note = _by_model(known, place, panel)
    return files, "; ".join(filter(None, [f"pattern {pattern}", quantity.title, note]))


def _pareto(cells: pd.DataFrame, place: Path) -> _Drawn:
    known = _with_number(cells, "accuracy", "no sparse cell has an accuracy")
    if known["flops_density"].nunique() < 2:
        raise NothingToDraw("all sparse cells have one linear-FLOP density")

    def panel(axis: Axes, of_model: pd.DataFrame) -> str:
        axis.plot(of_model["flops_density"], of_model["accuracy"] * 100, "o", color="0.6", markersize=2.5, linestyle="none", label="cells")  # fmt: skip
        front = pd.DataFrame(pareto_front(of_model))
        axis.step(front["flops_density"], front["accuracy"] * 100, where="post", color="black", marker="s", label="Pareto front")  # fmt: skip
        for point in front.drop_duplicates("pattern").to_dict("records"):
            words = [str(point["pattern"]), *(str(point[name]) for name in ("criterion", "mitigation") if point[name] != "none")]  # fmt: skip
            at_edge = point["flops_density"] > 0.9
            axis.annotate(plain(" ".join(words)), (point["flops_density"], point["accuracy"] * 100), xytext=(-2 if at_edge else 2, -7), ha="right" if at_edge else "left", textcoords="offset points", fontsize=5)  # fmt: skip
        _finish(axis, "linear FLOPs kept (share; theory)", "mean accuracy (%)")
        return ""

    with_dense = cells[cells["model"].isin(known["model"]) & cells["accuracy"].notna()]
    return _by_model(with_dense, place, panel)


def pareto_front(cells: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Yield the cells that no other beats in both FLOPs and accuracy, by rising FLOP density."""
    best = -np.inf
    for cell in cells.sort_values(["flops_density", "accuracy"], ascending=[True, False]).to_dict("records"):
        if cell["accuracy"] > best:
            best = cell["accuracy"]
            yield {str(key): value for key, value in cell.items()}


def _layer_errors(sensitivities: Sequence[Sensitivity], place: Path) -> Figure:
    """Draw the error of each projection by depth; a panel for each of the first tables."""
    shown = sensitivities[:MOST_MODELS]
    titles = [plain(sensitivity.name.rpartition("_")[0].replace("_", " ")) for sensitivity in shown]
    with panels(titles, place) as (files, axes):
        for axis, sensitivity in zip(axes, shown, strict=True):
            for number, (projection, line) in enumerate(sensitivity.rows.groupby("projection", sort=False)):
                axis.plot(line["block"], line["relative_error"], label=plain(projection), **look(number))
            axis.set_ylim(bottom=0)
            _finish(axis, "block", "‖ŷ − y‖ / ‖y‖")
    n_more = len(sensitivities) - len(shown)
    return Figure("error", "Output error by layer", DATA, files, f"{n_more} more left out" if n_more else "")


_DRAWINGS: Mapping[str, tuple[str, Callable[[pd.DataFrame, Path], _Drawn]]] = {
    "drop_pattern": ("Drop against pattern", _against_pattern(QUANTITIES["drop"])),
    "ratio_pattern": ("Perplexity ratio against pattern", _against_pattern(QUANTITIES["ratio"])),
    "criterion_mitigation": ("Criteria and mitigations", _heat_map),
    "pareto": ("Quality against linear FLOPs", _pareto),
}
"""Title and drawing by name. A drawing gets the cells of one kind of data, and the files' path without suffix."""
