"""Everything on docs/add-your-own.md is run as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-your-own.md"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The page's files, written where the page says."""
    files = re.findall(r"\*\*`(mine/[^`]+)`\*\*\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(files) == 3
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def run(words: list[str], folder: Path) -> str:
    path = os.pathsep.join(["mine", str(PAGE.parents[1])])
    done = subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_methods_from_a_notebook_run(tmp_path: Path) -> None:
    scripts = re.findall(r"```python\n((?:from dataclasses import replace\n\n)?import torch\n.*?)```", PAGE.read_text(), re.DOTALL)  # fmt: skip
    said = [run([sys.executable, "-W", "error", "-c", script], tmp_path) for script in scripts]
    assert len(said) == 2
    assert "<sparse Qwen2ForCausalLM: 8:16 ColumnSum shift+var, 14 layers>" in said[0]
    assert "<sparse Qwen2ForCausalLM: 8:16 wina HalfMean+var, 14 layers>" in said[1]


def test_the_commands_run(mine: Path) -> None:
    [block] = re.findall(r"```shell\n(.*?)```", PAGE.read_text(), re.DOTALL)
    listing, command = [shlex.split(line) for line in block.splitlines() if line.startswith("nmsweep")]
    listed = run([sys.executable, "-m", *listing], mine)
    assert "column_norm" in listed
    assert "offset" in listed
    run([sys.executable, "-m", *command], mine)
    [cell] = mine.glob("results/cells/*column-norm*")
    metrics = pd.read_csv(cell / "metrics.csv")
    assert metrics.loc[0, ["criterion", "mitigation", "sparsity"]].tolist() == ["column_norm", "offset+var", 0.5]
    assert "value: 0.02" in (cell / "config.yaml").read_text()


def test_the_files_keep_the_contract_and_have_names_in_python(mine: Path) -> None:
    script = """
from nmsweep import check_method, sparsify
from nmsweep.models import ModelSpec, load_model
from my_methods import ColumnNorm, Offset
check_method(ColumnNorm(2.0), Offset())
model = load_model(ModelSpec(name="t", source="tiny", shape="tiny-llama"), dtype="float32", device="cpu").model
print(sparsify(model, criterion={"name": "column_norm", "power": 2.0}, mitigation="offset", config_dir="mine"))
"""
    assert "8:16 column_norm offset, 14 layers>" in run([sys.executable, "-W", "error", "-c", script], mine)
