"""Tables of a small committed results folder, in every format, against stored ones; `report/make.py` made both."""

import sys
from pathlib import Path

import pandas as pd
import pytest

HERE = Path(__file__).parent / "report"
sys.path.insert(0, str(HERE))

import make  # noqa: E402

TABLES = make.tables(HERE / "results")


def test_the_stored_tables_are_the_ones_that_are_made() -> None:
    stored = {file.stem for file in HERE.glob("*.md")}
    assert stored == set(TABLES)
    assert {name.partition("_")[0] for name in stored} == {"mini", "real"}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_is_the_stored_one(name: str) -> None:
    for file, text in make.texts(name, TABLES[name]).items():
        if not file.endswith(".csv"):
            assert text == (HERE / file).read_text(), file
    stored, made = pd.read_csv(HERE / f"{name}.csv"), make.formats.to_csv(TABLES[name])
    pd.testing.assert_frame_equal(made, stored, check_dtype=False, rtol=1e-6)  # float32 replicates, whatever the BLAS
