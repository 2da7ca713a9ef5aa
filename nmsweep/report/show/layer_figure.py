"""The figure of the output error by layer."""

from collections.abc import Sequence
from pathlib import Path

from nmsweep.report.numbers.layers import DATA, Sensitivity
from nmsweep.report.show.figures import Figure
from nmsweep.report.show.formats import plain
from nmsweep.report.show.style import legend_below, legend_room, look, panels

_MOST = 4


def draw_layers(found: Sequence[Sensitivity], folder: Path) -> Figure:
    """The error of each projection by depth; a panel for each of the first tables."""
    shown, files = found[:_MOST], list[Path]()
    n_lines = max(one.rows["projection"].nunique() for one in shown)
    with panels([_title(one) for one in shown], files, folder / "error", legend_room(n_lines)) as axes:
        for axis, one in zip(axes, shown, strict=True):
            for number, (projection, line) in enumerate(one.rows.groupby("projection", sort=False)):
                axis.plot(line["block"], line["relative_error"], label=plain(projection), **look(number))
            axis.set_ylim(bottom=0)
            axis.set_xlabel("block")
            axis.set_ylabel("‖ŷ − y‖ / ‖y‖")
            legend_below(axis)
    note = f"{len(found) - _MOST} more left out" if len(found) > _MOST else ""
    return Figure("error", "Output error by layer", DATA, files, note)


def _title(one: Sensitivity) -> str:
    return plain(one.name.rpartition("_")[0].replace("_", " "))
