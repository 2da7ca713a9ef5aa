"""How figures look: column width, colours that colour-blind readers tell apart, markers and dashes for greyscale.

The font goes with the text of most papers; embedding it as TrueType takes less time than DejaVu, whose tables are large.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg, backend_pdf  # noqa: F401 - imported once, before the processes part
from matplotlib.figure import Figure

COLUMN = 3.35
"""Width of a paper's column, inches."""

FORMATS: Mapping[str, Mapping[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 1}},  # sooner, and a fifth larger
}
"""Suffixes, and how files are saved: without the metadata that would make equal figures differ."""

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's."""

MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (6, 3)))

_RC: Any = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "legend.fontsize": 6, "xtick.labelsize": 6, "ytick.labelsize": 6,
    "axes.linewidth": 0.6, "lines.linewidth": 1.0, "lines.markersize": 3.5, "legend.frameon": False, "axes.grid": True,
    "grid.linewidth": 0.3, "axes.spines.top": False, "axes.spines.right": False, "axes.titley": 1.0,
    "font.family": ["STIXGeneral", "DejaVu Sans"], "pdf.fonttype": 42, "text.parse_math": False, "savefig.dpi": 200,
}  # fmt: skip


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the series of that number; each alone tells series apart."""
    place = number % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[place]}


_RIGHT, _TOP, _XLABEL, _LEGEND_ROW = 0.08, 0.2, 0.36, 0.115
"""Margins of a panel in inches: fixed, since a layout that is found by drawing costs more than all the drawing."""


@contextmanager
def panels(
    titles: list[str], files: list[Path], place: Path, below: float = 0.0, left: float = 0.45
) -> Iterator[list[Axes]]:
    """Axes, one a title, two a row; saved in every format when the block ends. One panel is one column wide.

    Args:
        titles: of the panels; a single panel has none.
        files: is told what was written.
        place: the files' path without suffix.
        below: room below each panel for its legend, or for long tick labels, in inches.
        left: room for the labels on the left, in inches.
    """
    n_columns = min(2, len(titles))
    n_rows = -(-len(titles) // n_columns)
    height = 1.75 + _TOP + _XLABEL + below
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(COLUMN * n_columns, height * n_rows))
        axes = [_panel(figure, number, (n_rows, n_columns), below, left) for number in range(len(titles))]
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title if len(titles) > 1 else "")
        yield axes
        _save(figure, files, place)


def _panel(figure: Figure, number: int, grid: tuple[int, int], below: float, left: float) -> Axes:
    width, height = figure.get_size_inches()
    each_width, each_height = width / grid[1], height / grid[0]
    x = each_width * (number % grid[1]) + left
    bottom = each_height * (grid[0] - 1 - number // grid[1]) + _XLABEL + below
    box = (x / width, bottom / height, (each_width - left - _RIGHT) / width, (each_height - _TOP - _XLABEL - below) / height)  # fmt: skip
    return figure.add_axes(box)


def legend_room(n_entries: int) -> float:
    """Inches below a panel for a legend of two columns."""
    return _LEGEND_ROW * -(-n_entries // 2) + 0.05


def legend_below(axis: Axes) -> None:
    """The legend under the axis: nothing of the data is hidden."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    height = figure.get_size_inches()[1]
    own = axis.get_position().height * height
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -_XLABEL / own), ncols=2, borderaxespad=0, columnspacing=1, labelspacing=0.2)  # fmt: skip


def _save(figure: Figure, files: list[Path], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    for suffix, options in FORMATS.items():
        files.append(place.with_suffix(f".{suffix}"))
        figure.savefig(files[-1], **options)
