import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if shutil.which("nvidia-smi") is None:  # before anything imports triton: it reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nmsweep.data.tasks import MINI_FOLDER

MINI_AS = {
    "arc_easy": ("science", "test"),
    "hellaswag": ("continuation", "validation"),
    "winogrande": ("cloze", "validation"),
    "boolq": ("yesno", "validation"),
}
"""Harness task whose form a shipped file has: file, split."""


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mirror in the layout of `data.mirror`, made of the shipped items; piqa is not in it."""
    root = tmp_path_factory.mktemp("mirror")
    for task, (name, split) in MINI_AS.items():
        (root / task).mkdir()
        lines = (MINI_FOLDER / f"{name}.jsonl").read_text().splitlines()
        (root / task / f"{split}.jsonl").write_text("\n".join(lines[:24]) + "\n")
    science = [json.loads(line) for line in (MINI_FOLDER / "science.jsonl").read_text().splitlines()]
    (root / "arc_challenge").mkdir()
    (root / "arc_challenge" / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in science[24:48]))
    (root / "wikitext2").mkdir()
    prose = (MINI_FOLDER / "prose.txt").read_text()[:6000]
    (root / "wikitext2" / "test.txt").write_text("".join(f" {line.strip()} \n" for line in prose.splitlines()))
    return root


@pytest.fixture(scope="session")
def real_mirror() -> Path:
    """Real benchmark data, where NMSWEEP_TEST_MIRROR (or a folder shared/data beside the checkout) has it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("NMSWEEP_TEST_MIRROR", beside))
    if not (root / "wikitext2" / "test.txt").is_file():
        pytest.skip("no real benchmark data: set NMSWEEP_TEST_MIRROR to a mirror")
    return root


@pytest.fixture
def nmsweep(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: words to (exit code, stdout, stderr)."""
    from nmsweep.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            main(list(words))
        except SystemExit as ended:
            code = 0 if ended.code is None else int(ended.code)
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "results"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
