"""Every name in a results folder is written once, in `results/layout.py`."""

import re
from pathlib import Path

import nmsweep
from nmsweep.results import layout

PACKAGE = Path(nmsweep.__file__).parent
NAMES = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
ELSEWHERE = {"config/defaults.py": {"config.yaml"}, "commands/list.py": {"config.yaml"}}
"""Files of `conf/` with the name of a file of a cell."""


def literals(file: Path) -> set[str]:
    """The names of the layout that a file writes out: as the part of a path, or anywhere if they are no plain word."""
    text = file.read_text()
    parts = set(re.findall(r'/ f?"([^"{]+)"', text))
    return {name for name in NAMES if name in parts or ("." in name and f'"{name}"' in text)}


def test_names_of_the_layout_are_written_in_one_file() -> None:
    wrong = {
        str(file.relative_to(PACKAGE)): names
        for file in PACKAGE.rglob("*.py")
        if file.name != "layout.py" and (names := literals(file) - ELSEWHERE.get(str(file.relative_to(PACKAGE)), set()))
    }
    assert not wrong


def test_a_name_written_out_is_found(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text('status = "failed"\nplace = results_dir / "cells" / name\nother = open("metrics.csv")\n')
    assert literals(file) == {"cells", "metrics.csv"}


def test_the_layout_says_what_each_name_is() -> None:
    assert layout.__doc__
    assert all(
        name in layout.__doc__
        for name in NAMES - set(layout.CELL_FILES) - {"part.json", "nmsweep.log", ".tmp_", ".old_"}
    )
