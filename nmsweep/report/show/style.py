"""The look of figures: column width, and colours, markers and dashes that each tell series apart by themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN = 3.35
"""Width of a paper's column, inches."""

HEIGHT = 2.6
"""Height of a panel with its legend, inches."""

FORMATS: Mapping[str, Mapping[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"metadata": {"Software": None}},
}
"""How figures are saved, by suffix: without the metadata that would make equal figures differ."""

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The palette of Okabe and Ito, for colour-blind readers."""

MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (6, 3)))

_RC: Any = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "legend.fontsize": 6, "xtick.labelsize": 6, "ytick.labelsize": 6,
    "axes.linewidth": 0.6, "lines.linewidth": 1.0, "lines.markersize": 3.5, "legend.frameon": False, "axes.grid": True,
    "grid.linewidth": 0.3, "axes.spines.top": False, "axes.spines.right": False, "axes.titley": 1.0,
    "font.family": ["STIXGeneral", "DejaVu Sans"], "pdf.fonttype": 42, "text.parse_math": False, "savefig.dpi": 200,
}  # fmt: skip


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and dash of a series."""
    place = number % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[place]}


@contextmanager
def panels(titles: list[str], place: Path) -> Iterator[tuple[list[Path], list[Axes]]]:
    """Yield the files and axes of a figure, which is saved in every format when the block ends.

    Args:
        titles: one for each panel, two panels per row; a single panel is one column wide and has no title.
        place: the files' path without suffix.
    """
    n_columns = min(2, len(titles))
    n_rows = -(-len(titles) // n_columns)
    files = [place.with_suffix(f".{suffix}") for suffix in FORMATS]
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(COLUMN * n_columns, HEIGHT * n_rows), layout="constrained")
        axes = [figure.add_subplot(n_rows, n_columns, number) for number in range(1, len(titles) + 1)]
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title if len(titles) > 1 else "")
        yield files, axes
        place.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, **FORMATS[file.suffix[1:]])


def legend_below(axis: Axes) -> None:
    """Put the legend under the axis, where it hides no data."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, borderaxespad=0, columnspacing=1, labelspacing=0.2)  # fmt: skip
