"""The drawings behind the figures: each takes the cells of one kind of data, and says what it left out."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nmsweep.config.pattern import parse_pattern
from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.show.formats import plain
from nmsweep.report.show.spec import order
from nmsweep.report.show.style import legend_below, legend_room, look, panels
from nmsweep.results.layout import LAYERS

MOST_SERIES = 6
MOST_MODELS = 4


class NothingToDraw(Exception):  # noqa: N818 - no error: the figure is left out
    """A figure has nothing to show; the message says why."""


def _needed(cells: pd.DataFrame, column: str, why: str) -> pd.DataFrame:
    found = cells[cells[column].notna() & (cells["pattern"] != "dense")]
    if not len(found):
        raise NothingToDraw(why)
    return found


def _models(cells: pd.DataFrame) -> tuple[list[str], str]:
    """The models that get a panel, those with most cells first, and a word about the others."""
    names = list(cells["model"].value_counts().index)
    rest = f"; {len(names) - MOST_MODELS} more models left out" if len(names) > MOST_MODELS else ""
    return sorted(names[:MOST_MODELS]), rest


def _series(cells: pd.DataFrame, column: str) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """Lines of one panel: `act` without mitigation if it is there, then those with the smallest mean; a word on the rest."""
    names = [name for name in ("operand", "criterion", "mitigation", "targets", "scope", "profile", "dtype", "seed", "variant") if cells[name].nunique() > 1]  # fmt: skip
    names = [name for name in names if name != "operand"] or ["criterion"]
    other = (cells["criterion"] != "act") | (cells["mitigation"] != "none")
    grouped = cells.assign(_other=other).groupby(names, sort=False)
    rank = pd.DataFrame({"_other": grouped["_other"].any(), "_n": grouped.size(), "_mean": grouped[column].mean()})
    rank["_number"] = range(len(rank))
    rank = rank.sort_values(["_other", "_n", "_mean"], ascending=[True, False, True], kind="stable")[:MOST_SERIES]
    numbers = grouped.ngroup()
    lines = [(key if isinstance(key, tuple) else (key,), cells[numbers == number]) for key, number in rank["_number"].items()]  # fmt: skip
    rest = f"; at most {MOST_SERIES} series a panel, the others are left out" if grouped.ngroups > MOST_SERIES else ""
    return [(plain(", ".join(map(str, key))), same) for key, same in lines], rest


def _bars(line: pd.DataFrame, quantity: Quantity) -> Any:
    """Lengths of the interval's two arms [2, points]."""
    if line[quantity.low].isna().all():
        return None
    value = line[quantity.column]
    arms = np.stack([value - line[quantity.low], line[quantity.high] - value])
    return np.clip(np.nan_to_num(arms), 0, None) * quantity.scale


def _by_pattern(quantity: Quantity) -> Callable[[pd.DataFrame, Path, list[Path]], str]:
    def draw(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
        found = _needed(cells, quantity.column, f"no sparse cell has a {quantity.title}")
        grouped = found[found["kind"] == "n:m"]
        if not len(grouped):
            raise NothingToDraw("no cell has an N:M pattern")
        models, note = _models(grouped)
        with panels([plain(model) for model in models], files, place, legend_room(MOST_SERIES + 2)) as axes:
            for axis, model in zip(axes, models, strict=True):
                rest = _pattern_panel(axis, found[found["model"] == model], quantity)
                note += rest if rest not in note else ""
        return note.lstrip("; ")

    return draw


def _pattern_panel(axis: Axes, cells: pd.DataFrame, quantity: Quantity) -> str:
    grouped = cells[cells["kind"] == "n:m"]
    patterns = sorted(set(grouped["pattern"]), key=lambda pattern: order("pattern", pattern))
    lines, rest = _series(grouped, quantity.column)
    for number, (name, line) in enumerate(lines):
        line = line.assign(_x=[patterns.index(pattern) for pattern in line["pattern"]]).sort_values("_x")
        x = line["_x"] + 0.06 * (
            number - (len(lines) - 1) / 2
        )  # side by side, so that intervals do not hide each other
        axis.errorbar(x, line[quantity.column] * quantity.scale, yerr=_bars(line, quantity), label=name, capsize=1.5, elinewidth=0.6, **look(number))  # fmt: skip
    _unstructured(axis, cells, grouped, lines[0][1], quantity)
    axis.set_xticks(range(len(patterns)), patterns)
    axis.set_xlabel("pattern (N kept of M)")
    axis.set_ylabel(quantity.title)
    legend_below(axis)
    return rest


def _unstructured(
    axis: Axes, cells: pd.DataFrame, grouped: pd.DataFrame, first: pd.DataFrame, quantity: Quantity
) -> None:
    """A line where per-token top-k of the same sparsity stands, of the first series' methods."""
    same = cells[cells["kind"] == "unstructured"]
    for name in ("criterion", "mitigation", "targets", "scope"):
        same = same[same[name] == first[name].iloc[0]]
    sparsities = {parse_pattern(pattern).sparsity for pattern in grouped["pattern"]}
    for _, line in same.groupby("pattern", sort=False):
        pattern = str(line["pattern"].iloc[0])
        if parse_pattern(pattern).sparsity in sparsities:
            axis.axhline(line[quantity.column].mean() * quantity.scale, color="0.45", linestyle=(0, (1, 2)), linewidth=1, label=f"{pattern} unstructured")  # fmt: skip


def _heat_map(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
    quantity = QUANTITIES["drop"] if cells["drop"].notna().any() else QUANTITIES["ratio"]
    found = _needed(cells, quantity.column, "no sparse cell has a drop or a ratio")
    counts = found[found["kind"] == "n:m"]["pattern"].value_counts()
    if not len(counts) or found["criterion"].nunique() < 2 or found["mitigation"].nunique() < 2:
        raise NothingToDraw("fewer than two criteria or two mitigations with an N:M pattern")
    pattern = "8:16" if counts.get("8:16", 0) == counts.max() else str(counts.index[0])
    found = found[found["pattern"] == pattern]
    models, note = _models(found)
    with panels([plain(model) for model in models], files, place, 0.45, left=0.75) as axes:
        for axis, model in zip(axes, models, strict=True):
            _heat_panel(axis, found[found["model"] == model], quantity, found[quantity.column] * quantity.scale)
    return f"pattern {pattern}; {quantity.title}{note}"


def _heat_panel(axis: Axes, cells: pd.DataFrame, quantity: Quantity, span: pd.Series) -> None:
    """Numbers on shades; one scale for all panels, whose ends are those of `span`."""
    grid = (
        cells.pivot_table(index="criterion", columns="mitigation", values=quantity.column, sort=False) * quantity.scale
    )
    grid = grid.loc[sorted(grid.index), sorted(grid.columns, key=lambda name: order("mitigation", name))]
    axis.imshow(grid.to_numpy(float), cmap="cividis_r", aspect="auto", vmin=span.min(), vmax=span.max())
    axis.grid(False)
    axis.set_xticks(range(grid.shape[1]), [plain(name) for name in grid.columns], rotation=40, ha="right", rotation_mode="anchor")  # fmt: skip
    axis.set_yticks(range(grid.shape[0]), [plain(name) for name in grid.index])
    middle = (span.min() + span.max()) / 2
    for (row, column), value in np.ndenumerate(grid.to_numpy(float)):
        text = "–" if np.isnan(value) else f"{value:.{quantity.digits}f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=5, color="white" if value > middle else "black")


def _perplexity_density(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
    found = _needed(cells, "perplexity", "no sparse cell has a perplexity")
    if found["sparsity"].nunique() < 2:
        raise NothingToDraw("all sparse cells have one sparsity")
    models, note = _models(found)
    with panels([plain(model) for model in models], files, place, legend_room(MOST_SERIES + 1)) as axes:
        for axis, model in zip(axes, models, strict=True):
            lines, rest = _series(found[found["model"] == model], "perplexity")
            note += rest if rest not in note else ""
            for number, (name, line) in enumerate(lines):
                style = look(number) | {"linestyle": "none"}
                axis.plot(line["density"], line["perplexity"], label=name, **style)
            dense = cells[(cells["model"] == model) & (cells["pattern"] == "dense")]
            axis.plot(dense["density"], dense["perplexity"], "*", color="0.3", markersize=6, linestyle="none", label="dense")  # fmt: skip
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.grid(True, which="minor", axis="y")
            axis.set_xlabel("density of target layers' inputs")
            axis.set_ylabel("perplexity")
            legend_below(axis)
    return note.lstrip("; ")


def _metadata_bits(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
    found = _needed(cells[cells["bits"].notna()], "drop", "no cell with an N:M pattern has a drop")
    models, note = _models(found)
    with panels([plain(model) for model in models], files, place, legend_room(MOST_SERIES + 1)) as axes:
        for axis, model in zip(axes, models, strict=True):
            of_model = found[found["model"] == model]
            lines, rest = _series(of_model, "drop")
            note += rest if rest not in note else ""
            for number, (name, line) in enumerate(lines):
                style = look(number) | {"linestyle": "none"}
                axis.errorbar(line["bits"] + 0.004 * number, line["drop"] * 100, yerr=_bars(line, QUANTITIES["drop"]), label=name, capsize=1.5, elinewidth=0.6, **style)  # fmt: skip
            _name_patterns(axis, of_model)
            axis.set_xlabel("metadata (theory), bits an element")
            axis.set_ylabel(QUANTITIES["drop"].title)
            legend_below(axis)
    return note.lstrip("; ")


def _name_patterns(axis: Axes, cells: pd.DataFrame) -> None:
    """Patterns named above the points of their bits."""
    for bits, same in cells.groupby("bits"):
        names = sorted(set(same["pattern"]), key=lambda pattern: order("pattern", pattern))
        axis.annotate("\n".join(names), (float(str(bits)), float(np.nanmax(same[["drop", "drop_high"]].to_numpy(float))) * 100), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=5)  # fmt: skip
    axis.set_ylim(top=float(np.nanmax(cells[["drop", "drop_high"]].to_numpy(float))) * 100 * 1.2)


def _pareto(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
    found = _needed(cells, "accuracy", "no sparse cell has an accuracy")
    if found["flops_density"].nunique() < 2:
        raise NothingToDraw("all sparse cells have one linear-FLOP density")
    models, note = _models(found)
    with panels([plain(model) for model in models], files, place, legend_room(2)) as axes:
        for axis, model in zip(axes, models, strict=True):
            of_model = cells[(cells["model"] == model) & cells["accuracy"].notna()]
            axis.plot(of_model["flops_density"], of_model["accuracy"] * 100, "o", color="0.6", markersize=2.5, linestyle="none", label="cells")  # fmt: skip
            front = pd.DataFrame(pareto_front(of_model))
            axis.step(front["flops_density"], front["accuracy"] * 100, where="post", color="black", marker="s", label="Pareto front")  # fmt: skip
            for point in front.drop_duplicates("pattern").to_dict("records"):
                words = [str(point["pattern"]), *(str(point[name]) for name in ("criterion", "mitigation") if point[name] != "none")]  # fmt: skip
                axis.annotate(plain(" ".join(words)), (point["flops_density"], point["accuracy"] * 100), xytext=(-2 if point["flops_density"] > 0.9 else 2, -7), ha="right" if point["flops_density"] > 0.9 else "left", textcoords="offset points", fontsize=5)  # fmt: skip
            axis.set_xlabel("linear FLOPs kept (share; theory)")
            axis.set_ylabel("mean accuracy (%)")
            legend_below(axis)
    return note.lstrip("; ")


def pareto_front(cells: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Cells that no other beats: every other has more FLOPs, or a lower accuracy; by rising FLOP density."""
    best = -np.inf
    for cell in cells.sort_values(["flops_density", "accuracy"], ascending=[True, False]).to_dict("records"):
        if cell["accuracy"] > best:
            best = cell["accuracy"]
            yield {str(key): value for key, value in cell.items()}


def _layer_profile(cells: pd.DataFrame, place: Path, files: list[Path]) -> str:
    """Realised sparsity by depth, of the cells whose layers differ from one another."""
    found = _needed(cells, "sparsity", "there is no sparse cell")
    varied = found[found["kind"].isin(["threshold", "policy"])]
    lines = [(cell, _layers(Path(cell["place"]))) for cell in varied.head(MOST_SERIES).to_dict("records")]
    lines = [(cell, table) for cell, table in lines if table["sparsity"].nunique() > 1]
    if not lines:
        raise NothingToDraw("the realised sparsity of every target layer is that of its pattern")  # fmt: skip
    with panels([""], files, place, legend_room(MOST_SERIES)) as (axis,):
        for number, (cell, table) in enumerate(lines):
            words = [str(cell[name]) for name in ("model", "pattern", "criterion")]
            style = look(number) | {"marker": "", "linewidth": 0.8}
            axis.plot(range(len(table)), table["sparsity"], label=plain(" ".join(words)), **style)
        axis.set_xlabel("target layer, in the order they run")
        axis.set_ylabel("realised sparsity")
        legend_below(axis)
    return ""


def _layers(place: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(place / LAYERS)
    except (OSError, ValueError):
        return pd.DataFrame({"sparsity": []})


DRAWINGS: Mapping[str, Callable[[pd.DataFrame, Path, list[Path]], str]] = {
    "drop_pattern": _by_pattern(QUANTITIES["drop"]),
    "ratio_pattern": _by_pattern(QUANTITIES["ratio"]),
    "criterion_mitigation": _heat_map,
    "perplexity_density": _perplexity_density,
    "drop_bits": _metadata_bits,
    "pareto": _pareto,
    "layers": _layer_profile,
}
"""By name; a drawing is given cells, the files' path without suffix, and a list that it adds its files to."""
