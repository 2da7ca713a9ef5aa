"""The benchmarks of evaluation measure what they say. Nothing is asserted about seconds."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from nmsweep.bench import agreement, cells, scoring
from nmsweep.data.tasks import MINI_FOLDER, find_task
from nmsweep.models.tiny import tiny_model, tiny_tokenizer

TINY = ["model=tiny-llama", "tasks=mini_science", "eval.limit=6", "device=cpu"]


def test_agreement_compares_every_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main([*TINY, "methods=act,shift+var|clact,none"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "requests)" in line]
    assert len(lines) == 2 * 3 + 1
    for line in lines:
        found = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+e[+-]\d+) \(", line)}
        if " float64 " in line:
            assert found["packed"] < 1e-9
        if " float32 " in line:
            assert found["packed"] < 1e-3
            assert found["packed_exact"] < 1e-3 or " dense " not in line  # a near-tie may fall otherwise in fp32
            assert ("replayed" in found) == ("shift+var" in line)
    assert "model,task,pattern" in out


def test_agreement_says_what_the_batch_does_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main([*TINY, "methods=act,none", "rounded=only"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "requests)" in line]
    assert [" bfloat16 dense none none " in lines[0], " bfloat16 8:16 act none " in lines[1]] == [True, True]
    assert all(re.search(r"budget [\d.]+e[+-]\d+ \(mean [\d.]+e", line) for line in lines)
    assert len(lines) == 2


@pytest.mark.parametrize("module", [agreement, cells])
def test_a_mistake_is_one_message(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["model=no-such"]) == 2  # type: ignore[attr-defined]
    assert "model: 'no-such' is not known" in capsys.readouterr().err


def test_rounded_has_one_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main([*TINY, "rounded=all"]) == 2
    assert "rounded: 'all'; only is allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_cells_are_timed_with_and_without_packing(capfd: pytest.CaptureFixture[str]) -> None:
    assert cells.main([*TINY, "dtype=float32"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("pattern=")]
    assert len(lines) == 4
    assert all(re.search(r"mini_science \d+\.\d\d, total \d+\.\d\d s", line) for line in lines)
    assert lines[-1].startswith("pattern=dense eval.scoring=stock")


def test_a_group_is_timed_and_compared_as_its_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, part in (("one", slice(0, 6)), ("two", slice(6, 10))):
        rows = (MINI_FOLDER / "science.jsonl").read_text().splitlines(keepends=True)[part]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        config = {
            "task": f"own_{name}", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    group = {"group": "own", "task": ["own_one", "own_two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "_own.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    model = tiny_model("tiny-llama", 0, torch.float32, torch.device("cpu"))
    (row,) = scoring.run(
        model, tiny_tokenizer("tiny-llama"), [find_task("own", None, tmp_path)], device="cpu", limit=5, rounds=1
    )
    assert row["requests"] == 4 * (5 + 4)
    words = ["model=tiny-llama", "tasks=own", f"eval.include_path={tmp_path}", "eval.limit=2", "device=cpu"]
    assert agreement.main([*words, "methods=act,none", "rounded=only"]) == 0
    assert "tiny-llama own bfloat16 dense" in capsys.readouterr().out


def test_scoring_is_compared_on_the_same_requests() -> None:
    model = tiny_model("tiny-llama", 0, torch.float32, torch.device("cpu"))
    (row,) = scoring.run(
        model, tiny_tokenizer("tiny-llama"), [find_task("mini_science", None)], device="cpu", limit=20, num_fewshot=5,
        rounds=1, batch_tokens=2048,
    )  # fmt: skip
    assert row["requests"] == 80
    assert row["packed_tokens"] * 5 < row["stock_tokens"], "examples that all items share are computed once"
    assert row["max_difference"] < 1e-3
    assert row["flags_differ"] == 0
    assert row["packed_gb"] > 0
    assert row["stock_gb"] > 0
