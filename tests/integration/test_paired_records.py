"""What a cell keeps beside its numbers: enough to compute them again, and to set them against the dense cell's."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from nmsweep.calibration.text import cut
from nmsweep.commands.inspect import task_lines
from nmsweep.config.schema import EvalConfig
from nmsweep.data.tasks import find_task
from nmsweep.evaluate import items, perplexity
from nmsweep.models.tiny import tiny_model, tiny_tokenizer
from nmsweep.results.layout import items_file
from nmsweep.results.record import CellRecord, cell_folders, read_cell
from nmsweep.sparsity.api import sparsify
from nmsweep.statistics.comparison import compare
from nmsweep.statistics.identity import find_duplicates, scores_sha256

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float32", "device=cpu", "eval.seqlen=64", "eval.limit=16")


def cells(results: Path) -> dict[str, CellRecord]:
    """Records by pattern."""
    return {record.metrics["pattern"].iloc[0]: record for record in map(read_cell, cell_folders(results))}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a sparse cell of the mini tasks."""
    results = tmp_path_factory.mktemp("paired") / "results"
    words = [sys.executable, "-m", "nmsweep", *TINY, "pattern=2:4", f"results_dir={results}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return results


@pytest.mark.parametrize("method", ["act", "wt"])
def test_divergence_from_dense_is_that_of_the_full_distributions(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "COMPARED_TOKENS", 150)  # two windows and a bit
    model = tiny_model("tiny-llama", 0, torch.float32, torch.device("cpu"))
    tokenizer, source = tiny_tokenizer("tiny-llama"), find_task("mini_prose", None)
    ids = cut(source.files["test"].read_text(), tokenizer, 64, bos=False)[:4]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits.double().log_softmax(-1)  # type: ignore[no-any-return]

    dense = logits()
    with sparsify(model, pattern="2:4", criterion=method) as layers:
        sparse = logits()
        measured = perplexity.perplexity(
            model, tokenizer, source, seqlen=64, limit=4, batch_tokens=128, bos=False,
            as_dense=layers.as_dense,
        )  # fmt: skip
        with layers.as_dense():
            assert torch.equal(logits(), dense)
        assert torch.equal(logits(), sparse), "the block leaves the model sparse"
    kl = torch.nn.functional.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1)
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    n_compared = [63, 63, 21, 0]
    wanted = [float(kl[window, :n].mean()) for window, n in enumerate(n_compared) if n]
    assert measured.samples["kl"].iloc[:3].tolist() == pytest.approx(wanted, rel=1e-4)
    assert measured.samples["n_compared"].tolist() == n_compared
    assert math.isnan(measured.samples["kl"].iloc[3])
    values = {metric.metric: metric.value for metric in measured.metrics}
    assert values["kl_to_dense"] == pytest.approx(np.average(wanted, weights=n_compared[:3]), rel=1e-4)
    assert values["top1_agreement"] == pytest.approx(
        sum(float(same[window, :n].sum()) for window, n in enumerate(n_compared)) / sum(n_compared)
    )
    assert values["kl_to_dense"] > 0.01


def test_the_dense_side_of_the_comparison_is_computed_once_for_all_cells() -> None:
    model = tiny_model("tiny-llama", 0, torch.float32, torch.device("cpu"))
    tokenizer, source = tiny_tokenizer("tiny-llama"), find_task("mini_prose", None)

    def compared(pattern: str) -> tuple[int, pd.DataFrame]:
        passes = []
        with sparsify(model, pattern=pattern) as layers:

            def as_dense() -> AbstractContextManager[None]:
                passes.append(pattern)
                return layers.as_dense()

            result = perplexity.perplexity(
                model, tokenizer, source, seqlen=64, limit=4, batch_tokens=128, bos=False,
                as_dense=as_dense,
            )  # fmt: skip
        return len(passes), result.samples

    first, other, again = compared("2:4"), compared("8:16"), compared("2:4")
    assert (first[0], other[0], again[0]) == (4, 0, 0)
    pd.testing.assert_frame_equal(first[1], again[1])
    assert not first[1]["kl"].equals(other[1]["kl"])


def test_every_metric_can_be_computed_from_the_samples(sweep: Path) -> None:
    for record in cells(sweep).values():
        for (task, metric), value in record.metrics.set_index(["task", "metric"])["value"].items():  # type: ignore[misc]
            rows = record.samples[record.samples["task"] == task]
            if metric == "perplexity":
                again = math.exp(rows["nll"].sum() / rows["n_tokens"].sum())
            elif metric in ("kl_to_dense", "top1_agreement"):
                column = "kl" if metric == "kl_to_dense" else metric
                again = np.average(rows[column], weights=rows["n_compared"])
            else:
                scores = zip(rows["loglikelihoods"], rows["choice_chars"], rows["gold"], strict=True)
                again = np.mean(
                    [
                        np.argmax(np.divide(lls, chars if metric == "acc_norm" else 1)) == int(gold)
                        for lls, chars, gold in scores
                    ]
                )
            assert value == pytest.approx(again), (task, metric)


def test_only_a_sparse_cell_is_compared_with_the_dense_one(sweep: Path) -> None:
    found = {pattern: set(record.metrics["metric"]) for pattern, record in cells(sweep).items()}
    assert found["2:4"] - found["dense"] == {"kl_to_dense", "top1_agreement"}


def test_a_sparse_cell_and_its_dense_one_can_be_compared(sweep: Path) -> None:
    found = cells(sweep)
    table = compare(found["dense"].samples, found["2:4"].samples).set_index(["task", "metric"])
    for (task, metric), row in table.iterrows():  # type: ignore[misc]
        own = found["2:4"].metrics.set_index(["task", "metric"]).loc[(task, metric)]
        assert row["value"] == pytest.approx(own["value"])
        assert row["n_items"] == own["n_items"]
    assert table.loc[("mini_prose", "perplexity"), "kl"] > 0


def test_the_items_are_kept_as_text_once(sweep: Path) -> None:
    record = cells(sweep)["2:4"]
    tasks = record.provenance["tasks"]
    assert len(list((sweep / "items").iterdir())) == 4
    for task in ("mini_cloze", "mini_science"):
        items = pd.read_parquet(items_file(sweep, task, tasks[task]["data"]))
        rows = record.samples[record.samples["task"] == task]
        assert items["doc_hash"].tolist() == rows["doc_hash"].tolist()
        assert items["gold"].tolist() == rows["gold"].tolist()
        assert [list(chars) for chars in items["choice_chars"]] == [[len(c) for c in cs] for cs in items["choices"]]
        assert [list(chars) for chars in items["choice_chars"]] == [list(chars) for chars in rows["choice_chars"]]
    assert "Question:" in pd.read_parquet(items_file(sweep, "mini_science", tasks["mini_science"]["data"]))["text"][0]


def test_inspect_shows_flipped_items_with_their_text(nmsweep: Call, sweep: Path) -> None:
    found = cells(sweep)
    code, out, _ = nmsweep("inspect", found["2:4"].cell_id, f"results_dir={sweep}", "limit=2", "task=mini_science")
    assert code == 0
    assert "lost" in out or "gained" in out
    assert "Question:" in out
    assert "[right" in out
    assert out.count("\n  item ") <= 2
    assert "mini_cloze" not in out


def shown(tmp_path: Path, items: list[dict[str, object]], rows: dict[str, list[dict[str, object]]]) -> str:
    """What inspect says of a dense and a sparse cell with these samples."""
    place = items_file(tmp_path, "own", "data")
    place.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(items).to_parquet(place)
    cells = {
        name: SimpleNamespace(samples=pd.DataFrame(same), provenance={"tasks": {"own": {"data": "data"}}})
        for name, same in rows.items()
    }
    return "\n".join(task_lines(tmp_path, cells["sparse"], cells["dense"], "own", 5))  # type: ignore[arg-type]


def test_inspect_shows_a_continuation_without_choices(tmp_path: Path) -> None:
    item = {"item": 7, "doc_hash": "h", "text": "He took a long red", "choices": [], "gold": " rope"}
    row = {"task": "own", "item": 0, "doc_hash": "h", "gold": " rope"}
    dense = {**row, "metric_acc": 1.0, "loglikelihoods": [-0.5]}
    sparse = {**row, "metric_acc": 0.0, "loglikelihoods": [-4.25]}
    text = shown(tmp_path, [item], {"dense": [dense], "sparse": [sparse]})
    assert "He took a long red" in text, "items are found by their hash: a larger file numbers a group's otherwise"
    assert "   -0.50 →    -4.25  rope  [right]" in text
    assert "100.0 % lost, 0.0 % gained of 1 items" in text


def test_inspect_says_nothing_of_right_and_wrong_where_there_is_neither(tmp_path: Path) -> None:
    item = {"item": 0, "doc_hash": "h", "text": "Translate.", "choices": [], "gold": "word"}
    row = {"task": "own", "item": 0, "doc_hash": "h", "gold": "word"}
    dense, sparse = ({**row, "metric_chrf": value, "response": str(value)} for value in (31.5, 12.25))
    text = shown(tmp_path, [item], {"dense": [dense], "sparse": [sparse]})
    assert "nan % lost" not in text
    assert "own chrf: 31.500 → 12.250" in text
    assert "sparse: '12.25'; right: word" in text


def test_fewer_items_never_take_the_place_of_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write, sizes = find_task("mini_science", None), items._write, []
    place = items_file(tmp_path, source.task, "data")

    def keep(limit: int) -> None:
        items.keep_items(tmp_path, source, "data", EvalConfig(limit=limit))

    def meanwhile(place: Path, members: object, n_items: list[int]) -> None:
        """While one process writes its items, another comes with more."""
        if not sizes:
            sizes.append(n_items)
            other.start()
            time.sleep(0.3)
        write(place, members, n_items)  # type: ignore[arg-type]

    other = threading.Thread(target=keep, args=(9,))
    monkeypatch.setattr(items, "_write", meanwhile)
    monkeypatch.setattr(items, "WAIT_S", 0.01)
    keep(3)
    other.join()
    assert len(pd.read_parquet(place)) == 9
    keep(4)
    assert len(pd.read_parquet(place)) == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("abcdef012345",), "has no cell"),
        ((), "0 cells were named"),
        (("x", "limit=many"), "no number of items"),
    ],
)
def test_inspect_says_what_it_needs(nmsweep: Call, sweep: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = nmsweep("inspect", *words, f"results_dir={sweep}")
    assert (code, out) == (2, "")
    assert message in err
    dense = cells(sweep)["dense"]
    assert "is dense" in nmsweep("inspect", dense.folder.name, f"results_dir={sweep}")[2]


def test_a_method_that_changes_nothing_is_noticed(nmsweep: Call, results: Path) -> None:
    words = (*TINY, "pattern=2:4", "tasks=mini_science", f"results_dir={results}")
    code, _, err = nmsweep(*words, "scope=skip_first:4000")  # no item is so long: this is the dense model
    assert code == 0
    assert "identity watch: mini_science has bit-identical scores" in err
    assert "identity watch" not in nmsweep(*words)[2]


def test_identity_watch_tells_methods_apart_from_ways_of_asking() -> None:
    def cell(name: str, method: str, scores: str, part: str) -> tuple[str, dict[str, object]]:
        return name, {"method_id": method, "part_id": part, "tasks": {"arc": {"scores_sha256": scores}}}

    cells = [cell("a", "1", "s", "p1"), cell("b", "1", "s", "p2"), cell("c", "2", "other", "p3")]
    assert find_duplicates(cells) == []
    (duplicates,) = find_duplicates([*cells, cell("d", "3", "s", "p4")])
    assert duplicates.cells == ("a", "b", "d")
    assert find_duplicates([("old", {"part_id": "p", "tasks": {"arc": {}}}), *cells]) == []


def test_one_bit_of_one_score_is_another_hash() -> None:
    rows = pd.DataFrame({"item": [0, 1], "loglikelihoods": [[-1.0, -2.0], [-3.0, -4.0]]})
    moved = rows.copy()
    moved.at[1, "loglikelihoods"] = [-3.0, np.nextafter(-4.0, 0)]
    assert scores_sha256(rows) == scores_sha256(rows.copy())
    assert scores_sha256(rows) != scores_sha256(moved)


def test_the_same_cell_in_fresh_processes_gives_the_same_bytes(sweep: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nmsweep", *TINY, "pattern=2:4", "baseline=false", f"results_dir={tmp_path / 'r'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (again,) = cell_folders(tmp_path / "r")
    first = cells(sweep)["2:4"].folder
    assert again.name == first.name
    for name in ("metrics.csv", "layers.csv"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    tasks = [json.loads((folder / "provenance.json").read_text())["tasks"] for folder in (first, again)]
    assert all(tasks[0][task]["scores_sha256"] == tasks[1][task]["scores_sha256"] for task in tasks[0])
