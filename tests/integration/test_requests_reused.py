"""Requests, token ids and packed rows are built once for the cells of a process, and are those of a fresh one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nmsweep.config.schema import EvalConfig
from nmsweep.data.tasks import TaskSource, find_task
from nmsweep.evaluate import lm, task
from nmsweep.evaluate.harness import measure
from nmsweep.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task is in memory."""
    monkeypatch.setattr(task, "_tasks", {})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name everything that is built from here on."""
    names: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(
        task.ConfigurableTask, "fewshot_context", noted("prompt", task.ConfigurableTask.fewshot_context)
    )
    monkeypatch.setattr(lm, "plan", noted("plan", lm.plan))
    ids_of = lm.NMSweepLM._ids_of
    monkeypatch.setattr(
        lm.NMSweepLM, "_ids_of", lambda self, texts: (names.append("tokens"), ids_of(self, texts))[1] if texts else {}
    )
    return names


TOKENIZER = tiny_tokenizer("tiny-llama")


def run(seed: int = 0, source: TaskSource | None = None, tokenizer: Any = TOKENIZER, **prompting: Any) -> Any:
    """Measure a task; return its samples."""
    model = tiny_model("tiny-llama", seed, torch.float64, torch.device("cpu"))
    return measure(
        model, tokenizer, source or find_task("mini_science", None),
        EvalConfig(**{"limit": 6, "batch_tokens": 512, **prompting}),
    ).samples  # fmt: skip


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_the_next_cell_builds_nothing_and_gets_the_same(num_fewshot: int, built: list[str]) -> None:
    first = run(num_fewshot=num_fewshot)
    assert built.count("prompt") == 6
    assert {"tokens", "plan"} < set(built)
    built.clear()
    assert run(num_fewshot=num_fewshot).equals(first)
    other = run(seed=1, num_fewshot=num_fewshot)
    assert built == []
    assert other["doc_hash"].equals(first["doc_hash"])
    assert other["loglikelihoods"].tolist() != first["loglikelihoods"].tolist(), "answers are never kept"


def test_a_fresh_process_draws_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(num_fewshot=2)
    run(num_fewshot=3)  # moves the task's random state on
    monkeypatch.setattr(task, "_tasks", {})
    assert run(num_fewshot=2).equals(first)


def test_other_prompts_are_built_anew(built: list[str]) -> None:
    first = run()
    built.clear()
    assert len(run(limit=7)) == 7
    assert built.count("prompt") == 7
    built.clear()
    assert run(system_instruction="Answer.")["loglikelihoods"].tolist() != first["loglikelihoods"].tolist()
    assert built.count("prompt") == 6


def test_another_tokenizer_gets_requests_of_its_own(built: list[str]) -> None:
    run()
    built.clear()
    run(tokenizer=tiny_tokenizer("tiny-llama"))
    assert built == [], "the model was loaded again"
    chat = tiny_tokenizer("tiny-llama")
    chat.chat_template = "{{ messages[0]['content'] }}!"
    run(tokenizer=chat)
    assert built.count("prompt") == 6


def test_other_items_are_read_anew(tmp_path: Path) -> None:
    source = find_task("mini_science", None)
    lines = source.files["test"].read_text().splitlines(keepends=True)
    file = tmp_path / "science.jsonl"
    file.write_text("".join(lines[1:]))
    files = {**source.files, "test": file}
    moved = TaskSource(source.task, "harness", source.config, source.yaml_file, files, "test")
    assert run(source=moved, limit=5)["doc_hash"].tolist() == run()["doc_hash"].tolist()[1:]
    file.write_text("".join(lines[2:]))
    assert run(source=moved, limit=4)["doc_hash"].tolist() == run()["doc_hash"].tolist()[2:]
