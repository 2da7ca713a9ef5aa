"""Every shipped experiment composes, and its first lines say how many cells it has."""

import re

import pytest

from nmsweep.catalogue import options
from nmsweep.compose import cells_of
from nmsweep.config import RunConfig, to_plain

EXPERIMENTS = options("experiment")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_its_head_is_true(name: str) -> None:
    cells = cells_of([f"experiment={name}"], multirun=True, config_dir=None)
    head = EXPERIMENTS[name].file.read_text().partition("\ndefaults:")[0]
    assert f"nmsweep experiment={name}" in head
    if counted := re.search(r"(\d+) cells and (\d+) dense baselines", head):
        assert (len(cells), len(baselines(cells))) == (int(counted[1]), int(counted[2]))


def baselines(cells: list[RunConfig]) -> set[str]:
    """The dense cells that an experiment's cells need and that are not among them."""
    return {str(to_plain(cell.dense())) for cell in cells} - {str(to_plain(cell)) for cell in cells}


@pytest.mark.parametrize("name", ["patterns", "criteria", "mitigations", "operands", "families", "paper_table"])
def test_the_grids_of_the_paper_say_what_they_cost(name: str) -> None:
    assert "dense baselines" in EXPERIMENTS[name].file.read_text()
