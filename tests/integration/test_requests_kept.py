"""Requests and token ids that are kept, in memory and on disk, are those that building them anew gives."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nmsweep.data.tasks import TaskSource, find_task
from nmsweep.evaluate import kept, requests
from nmsweep.evaluate.harness import measure
from nmsweep.evaluate.lm import NMSweepLM
from nmsweep.evaluate.prompting import Prompting
from nmsweep.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing in memory."""
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "WORTH_KEEPING", 1)
    forget()
    return tmp_path / "cache"


def forget() -> None:
    kept._kept.clear()
    requests.encoded_pairs.cache_clear()


def run(limit: int = 6, mirror: Path | None = None, **how: Any) -> Any:
    """Samples of a task as a fresh process would give them."""
    forget()
    model, tokenizer = tiny_model("tiny-llama", 0, torch.float64, torch.device("cpu")), tiny_tokenizer("tiny-llama")
    source = find_task("mini_science", mirror)
    return measure(
        model, tokenizer, source, prompting=Prompting(limit=limit, **how), batch_tokens=512, advance=lambda n: None
    ).samples


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is built or encoded from here on."""
    done: list[str] = []
    encode, load = NMSweepLM._encode, kept.load_task

    def watched(source: TaskSource, num_fewshot: int) -> Any:
        task = load(source, num_fewshot)
        context = task.fewshot_context
        task.fewshot_context = lambda *args, **kwargs: (done.append("prompt"), context(*args, **kwargs))[1]
        return task

    monkeypatch.setattr(kept, "load_task", watched)
    monkeypatch.setattr(NMSweepLM, "_encode", lambda self, texts: (done.append("tokens"), encode(self, texts))[1])
    return done


def test_another_process_builds_nothing_and_gets_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, done = run(), count_builds(monkeypatch)
    assert run().equals(first)
    assert done == []
    assert {file.parent.name for file in cache.rglob("*.parquet")} == {"requests", "tokens"}


def test_another_way_of_asking_is_built_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    done = count_builds(monkeypatch)
    run(limit=7)
    assert done.count("prompt") == 7
    done.clear()
    run(system_instruction="Answer.")
    assert done.count("prompt") == 6


def test_other_items_are_built_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_task("mini_science", None)
    lines = source.files["test"].read_text().splitlines(keepends=True)
    before = source.content()
    file = tmp_path / "science.jsonl"
    file.write_text("".join(lines[1:]))
    moved = TaskSource(source.task, "harness", source.config, source.yaml_file, {"test": file}, "test")
    assert moved.content() != before
    assert requests._name(moved, 0, {}) != requests._name(source, 0, {})
    assert requests._name(source, 0, {}) != requests._name(source, 1, {})


def test_a_damaged_file_is_built_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run()
    for file in cache.rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    assert run().equals(first)
    assert "it is built again" in caplog.text
    caplog.clear()
    assert run().equals(first)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    (tmp_path / "file").touch()
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "file"))
    assert run().equals(first)


def test_texts_that_share_their_letters_are_told_apart() -> None:
    pairs = requests.EncodedPairs("a")
    assert pairs._name([("ab", "c")]) != pairs._name([("a", "bc")])
    assert pairs._name([("ab", "c")]) != requests.EncodedPairs("b")._name([("ab", "c")])


@pytest.mark.slow
def test_many_processes_may_fill_one_cache(cache: Path, tmp_path: Path) -> None:
    words = ["model=tiny-llama", "pattern=dense", "tasks=mini_continuation", "device=cpu", "dtype=float32"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "nmsweep", *words, f"results_dir={tmp_path / str(at)}"], stderr=subprocess.PIPE
        )
        for at in range(2)
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len(list((cache / "requests").glob("*.parquet"))) == 1
    assert not list(cache.rglob(".*"))
    numbers = {file.read_bytes() for file in tmp_path.glob("*/cells/*/metrics.csv")}
    assert len(numbers) == 1
