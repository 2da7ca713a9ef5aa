"""The pages of docs/methods are in step with the code."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "build.py"))
    finally:
        sys.path.remove(str(FOLDER))


def test_every_method_has_a_page_and_every_page_a_method(build: dict[str, Any]) -> None:
    assert {file.stem for file in FOLDER.glob("*.md")} == {*build["methods"](), "README"}


def test_generated_parts_are_what_the_code_says(build: dict[str, Any]) -> None:
    stale = [file.name for file, text in build["pages"]().items() if file.read_text() != text]
    assert not stale, "run `python docs/methods/build.py`"


def test_a_page_has_formula_cost_and_failure(build: dict[str, Any]) -> None:
    for name in build["methods"]():
        text = (FOLDER / f"{name}.md").read_text()
        for title in ("## Formula", "## Cost", "## When it fails"):
            assert len(text.partition(f"{title}\n\n")[2].split("\n##")[0].split()) >= 5 or name == "random", (
                name,
                title,
            )
        assert "\n| source | " in text, name


def test_everything_that_can_be_chosen_is_listed(nmsweep: Any, build: dict[str, Any]) -> None:
    code, said, _ = nmsweep("list")
    assert code == 0
    words = said.split()
    for name in (*build["methods"](), "threshold:p%", "N:M", "skip_first:K", "amber"):
        assert name in words, name
