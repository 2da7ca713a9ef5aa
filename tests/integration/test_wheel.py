"""The built wheel by itself: its own conf/, from any working directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, where only it can be imported from."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def nmsweep(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import sys, nmsweep; assert nmsweep.__file__.startswith(sys.argv.pop(1)); from nmsweep.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code, str(site), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_works_from_anywhere_and_imports_nothing_heavy(site: Path, tmp_path: Path) -> None:
    said = nmsweep(site, tmp_path, "--help")
    assert said.returncode == 0, said.stderr
    assert "pattern=" in said.stdout
    code = "import sys, nmsweep.cli; print(*sorted({'torch', 'transformers', 'pandas', 'lm_eval'} & set(sys.modules)))"
    heavy = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert heavy.stdout.strip() == "", heavy.stderr


def test_a_cell_runs_and_a_users_own_folder_adds_options(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    own = (ROOT / "conf" / "model" / "tiny-llama.yaml").read_text().replace("name: tiny-llama", "name: mine")
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(own)
    words = ("--config-dir", "mine", "model=mine", "pattern=2:4", "tasks=mini_science", "eval.limit=2", "dtype=float32")
    said = nmsweep(site, tmp_path, *words)
    assert said.returncode == 0, said.stderr
    assert {folder.name.split("_")[1] for folder in (tmp_path / "results" / "cells").iterdir()} == {"dense", "2-4"}
