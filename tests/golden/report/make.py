"""Write the small results folder and the tables beside this file: ``PYTHONPATH=tests python tests/golden/report/make.py``.

The folder is made up (`support.results_folder`), committed, and never written by a test; run this only when a table is meant
to change, and read the difference.
"""

import shutil
from pathlib import Path

from support.results_folder import HOSTILE, REAL, Plan, make_results

from nmsweep.report.numbers.scores import make_scores
from nmsweep.report.show import formats
from nmsweep.report.show.spec import Table
from nmsweep.report.show.tables import preset_tables
from nmsweep.results.read import read_results

HERE = Path(__file__).parent
WANTED = ("pattern_model_drop", "criterion_pattern_drop", "mitigation_pattern_ratio", "operand_pattern_drop")


def tables(results_dir: Path) -> dict[str, Table]:
    """The tables that are compared, by data and name."""
    results = read_results(results_dir)
    found = preset_tables(results, make_scores(results, []))
    return {f"{table.data}_{table.name}": table for table in found if table.name in WANTED}


def texts(name: str, table: Table) -> dict[str, str]:
    """File name and content of a table in each format."""
    return {
        f"{name}.md": formats.to_markdown(table),
        f"{name}.csv": formats.to_csv(table).to_csv(index=False),
        f"{name}.tex": formats.to_latex(table, f"tab:{name}".replace("_", "-")),
        f"{name}.html": formats.html_document(table),
    }


if __name__ == "__main__":
    folder = HERE / "results"
    shutil.rmtree(folder, ignore_errors=True)
    small = {"patterns": ("2:4", "8:16"), "n_items": 16, "n_windows": 4}
    make_results(folder, Plan(models=("alpha", HOSTILE[1]), mitigations=("none", "var"), failed_every=7, **small))
    make_results(folder, Plan(models=("alpha",), criteria=("act", "wanda"), mitigations=("none",), tasks=REAL, **small))
    for name, table in tables(folder).items():
        for file, text in texts(name, table).items():
            (HERE / file).write_text(text)
