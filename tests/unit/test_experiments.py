"""Every shipped experiment composes, and its header states the command, the number of cells and their cost."""

import re

import pytest

from nmsweep.config.catalogue import options
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig, to_plain

EXPERIMENTS = options("experiment")

PAPER_CELL_S = 81
"""Seconds of forward passes per cell of the paper's tasks, with an 8B model on an H200 (docs/clusters.md)."""


def head(name: str) -> str:
    return EXPERIMENTS[name].file.read_text().partition("\ndefaults:")[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_its_header_is_true(name: str) -> None:
    cells = cells_of([f"experiment={name}"], multirun=True, config_dir=None)
    header = head(name)
    assert f"\n# nmsweep experiment={name}" in header
    counted = re.search(r"(\d+) cells and (\d+) dense baselines?\.", header)
    assert counted is not None
    assert (len(cells), len(baselines(cells))) == (int(counted[1]), int(counted[2]))
    assert f"`nmsweep plan experiment={name}` estimates" in header
    if hours := re.search(r"At least ([\d.]+) hours on one H200 .* (\d+) s per cell", header):
        assert int(hours[2]) == PAPER_CELL_S
        assert hours[1] == f"{(int(counted[1]) + int(counted[2])) * PAPER_CELL_S / 3600:.1f}"


def baselines(cells: list[RunConfig]) -> set[str]:
    """Return the dense baselines that are not cells of the experiment."""
    return {str(to_plain(cell.dense())) for cell in cells} - {str(to_plain(cell)) for cell in cells}


@pytest.mark.parametrize("name", ["patterns", "criteria", "mitigations", "operands", "families", "paper_table"])
def test_the_grids_of_the_paper_state_their_cost(name: str) -> None:
    assert "hours on one H200" in head(name)
