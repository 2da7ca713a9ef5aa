"""The benchmarks of evaluation measure what they say. Nothing is asserted about seconds."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from agreement import main as measure_agreement
from cells import run as time_cells

from nmsweep.bench import scoring
from nmsweep.data.tasks import MINI_FOLDER, find_task
from nmsweep.models.tiny import tiny_model, tiny_tokenizer

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "tasks=mini_science", "eval.limit=6", "device=cpu")


@pytest.fixture
def agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pd.DataFrame]:
    """Run docs/measure/agreement.py; return its table."""

    def run(*words: str) -> pd.DataFrame:
        monkeypatch.chdir(tmp_path)
        measure_agreement(words)
        return pd.read_csv(tmp_path / "agreement.csv", keep_default_na=False, na_values=[""])

    return run


def test_agreement_compares_every_path(agreement: Callable[..., pd.DataFrame]) -> None:
    table = agreement(*TINY, "methods=act,shift+var|clact,none")
    assert len(table) == 2 * 3 + 1
    assert set(table["model"] + " " + table["task"]) == {"tiny-llama mini_science"}
    by_dtype = table.set_index("dtype")
    assert (by_dtype.loc["float64", "packed_max"] < 1e-9).all()
    fp32 = by_dtype.loc["float32"].set_index("criterion")
    assert (fp32["packed_max"] < 1e-3).all()
    assert fp32.loc["none", "packed_exact_max"] < 1e-3
    assert fp32["replayed_max"].notna().to_dict() == {"none": False, "act": True, "clact": False}


def test_agreement_says_what_the_batch_does_in_bf16(agreement: Callable[..., pd.DataFrame]) -> None:
    table = agreement(*TINY, "methods=act,none", "rounded=only")
    methods = table[["dtype", "pattern", "criterion", "mitigation"]].to_numpy().tolist()
    assert methods == [["bfloat16", "dense", "none", "none"], ["bfloat16", "8:16", "act", "none"]]
    assert table["budget_max"].notna().all()
    assert table["budget_mean"].notna().all()


@pytest.mark.slow
def test_whole_cells_are_timed_with_and_without_packing() -> None:
    table = pd.DataFrame(time_cells([*TINY, "dtype=float32"]))
    assert len(table) == 4
    assert (table["mini_science"] > 0).all()
    assert (table["mini_science"] <= table["total"]).all()
    assert table["cell"].iloc[-1] == "pattern=dense eval.scoring=stock"


def test_a_group_is_timed_and_compared_as_its_tasks(
    agreement: Callable[..., pd.DataFrame], nmsweep: Call, tmp_path: Path
) -> None:
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
    model, source = tiny_model("tiny-llama", 0, torch.float32, torch.device("cpu")), find_task("own", None, tmp_path)
    asked = scoring.task_requests(model, tiny_tokenizer("tiny-llama"), source, limit=5, num_fewshot=0)
    assert len(asked) == 4 * (5 + 4)
    words = ("model=tiny-llama", "tasks=own", f"eval.include_path={tmp_path}", "eval.limit=2", "device=cpu")
    table = agreement(*words, "methods=act,none", "rounded=only")
    assert set(table["task"]) == {"own"}


def test_scoring_is_compared_on_the_same_requests(nmsweep: Call, tmp_path: Path) -> None:
    code, _, err = nmsweep(
        "bench", "scoring", "model=tiny-llama", "dtype=float32", "device=cpu", "tasks=mini_science", "limit=20", "shots=5",
        "rounds=1", "batch_tokens=2048", f"out={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    (row,) = pd.read_csv(tmp_path / "scoring_tiny-llama_float32_cpu.csv").to_dict("records")
    assert row["requests"] == 80
    assert row["packed_tokens"] * 5 < row["stock_tokens"], "examples that all items share are computed once"
    assert row["max_difference"] < 1e-3
    assert row["flags_differ"] == 0
    assert row["packed_gb"] > 0
    assert row["stock_gb"] > 0
