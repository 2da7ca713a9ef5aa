"""Every command in the README and the docs: composed and validated, and run where a bare machine can run it."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from nmsweep.cli import COMMANDS
from nmsweep.config.compose import cells_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Fenced blocks of a page in one of some languages; "" is a block without one."""
    for language, text in FENCE.findall(page.read_text()):
        if language in languages:
            yield text


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of each command line, comments and continued lines resolved."""
    found = []
    for page in PAGES:
        for block in blocks(page, "", "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = _words(line.removeprefix("$ ").strip())
                if words:
                    found.append((page.relative_to(ROOT).as_posix(), words))
    return found


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == [".venv/bin/nmsweep"]:
        words[0] = "nmsweep"
    return words if words[:1] in (["nmsweep"], ["make"]) else []


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_command_is_one_that_exists(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in rest if "=" not in word]
        assert set(named) <= set(targets), page
        return
    if rest == ["--help"] or rest[:1] == ["bench"] or (rest[:1] and rest[0] in ON_RESULTS):
        return  # below
    if rest[:1] and rest[0] in COMMANDS:
        assert rest[0] in ("plan", "prefetch", "sensitivity"), "a subcommand that no test here runs or composes"
        rest = [word for word in rest[1:] if not word.startswith("skip=")]
    if "hydra/launcher=ray" in rest and find_spec("ray") is None:  # its plugin is no dependency: the rest is checked
        rest = [word for word in rest if "hydra/launcher" not in word and "hydra.launcher" not in word]
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = [re.sub(r"^(data\.mirror|calibration\.source)=\S+", rf"\1={tmp_path}/DIR", word) for word in rest]
    overrides = [
        re.sub(r"^model\.path=\S+", f"model.path={tmp_path}/DIR", word)
        for word in overrides
        if word not in ("-m", "--multirun")
    ]
    assert cells_of(overrides, multirun=len(overrides) < len(rest), config_dir=None), page


ON_RESULTS = ("report", "list", "status", "retry", "gc", "inspect")
"""Subcommands that need no more than the records of a small sweep: their documented words are run."""


def test_what_reads_results_runs_as_written(
    nmsweep: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["model=tiny-llama", "tasks=mini_science", "eval.limit=8", "dtype=float32"]
    assert nmsweep("-m", *small, "pattern=2:4", "mitigation=none,shift")[0] == 0
    shutil.copytree("results/cells", "results/reference/cells")
    (cell_id,) = {
        csv.parent.name.rsplit("_", 1)[1] for csv in Path("results/cells").glob("*2-4_act_shift*/metrics.csv")
    }
    said = {}
    for page, (_, *words) in commands():
        if words and words[0] in ON_RESULTS:
            words = ["results_dir=results" if word == "results_dir=DIR" else word for word in words]
            words = [{"A": "results", "B": "results/reference"}.get(word, word) for word in words]
            words = [cell_id if re.fullmatch(r"[0-9a-f]{12}", word) else word for word in words]
            code, out, err = nmsweep(*words)
            assert code == 0, f"{page}: nmsweep {' '.join(words)}: {err}"
            said[words[0]] = out
    assert set(said) == set(ON_RESULTS)
    assert "3 done" in said["status"]


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words[2:]) for page, words in commands() if words[1:2] == ["bench"]],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_benchmark_runs_as_written_but_smaller(
    page: str, words: list[str], nmsweep: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    smaller = {
        "kernel": ["batch=1", "seqlen=8", "hidden=64", "repeats=1"],
        "forward": ["batch=1", "seqlen=8", "model=tiny-llama"],
        "scoring": ["model=tiny-llama", "tasks=mini_science", "limit=4", "mirror="],
        "semistructured": ["tokens=64"],
        "sweep": ["records=20"],
    }
    code, out, err = nmsweep("bench", *words, *smaller[words[0]], "device=cpu", "rounds=1", f"out={tmp_path}")
    if words[0] == "semistructured":  # the words are understood; the rest takes the hardware
        assert (code, "sparse tensor cores" in err) == (2, True)
    else:
        assert code == 0, f"{page}: {err}"
        assert "medians of interleaved rounds" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_python_of_the_readme_runs() -> None:
    import torch

    from nmsweep.config.catalogue import options
    from nmsweep.models.loading import load_model
    from nmsweep.models.spec import ModelSpec

    loaded = load_model(ModelSpec.from_node(dict(options("model")["tiny-llama"].node)), dtype="float32", device="cpu")
    inputs = {"input_ids": torch.arange(32)[None] % 100}
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {"model": loaded.model, "inputs": inputs})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_of_the_package_exist(page: Path) -> None:
    for file in re.findall(r"`(nmsweep/[\w/]+(?:\.py|/))`", page.read_text()):
        assert (ROOT / file).exists(), file
