"""The worked example of docs/add-your-own.md is run as it stands there."""

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


def test_the_commands_run(mine: Path) -> None:
    [block] = re.findall(r"```shell\n(.*?)```", PAGE.read_text(), re.DOTALL)
    listing, command = [shlex.split(line) for line in block.splitlines() if line.startswith("nmsweep")]
    found = run([sys.executable, "-m", *listing], mine)
    assert "l1" in found
    assert "shift_part" in found
    run([sys.executable, "-m", *command], mine)
    [cell] = mine.glob("results/cells/*l1*")
    metrics = pd.read_csv(cell / "metrics.csv")
    assert metrics.loc[0, ["criterion", "mitigation", "sparsity"]].tolist() == ["l1", "shift_part+var", 0.5]
    assert list(mine.glob("results/.calibration/*.safetensors"))


def test_the_contract_holds(mine: Path) -> None:
    script = re.findall(r"```python\n(import torch\nfrom nmsweep.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(script) == 1
    run([sys.executable, "-W", "error", "-c", script[0]], mine)
