"""`load_results` against the tables of a report and the samples of the cells."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.results_folder import MINI, Plan, make_results

from nmsweep.errors import InputError
from nmsweep.report.build import make_report
from nmsweep.report.numbers.frame import load_results
from nmsweep.report.numbers.scores import make_scores
from nmsweep.results.read import read_results
from nmsweep.results.record import METRIC_COLUMNS

GUIDE = Path(__file__).parents[2] / "docs" / "reading-results.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frame") / "results"
    make_results(folder, Plan(models=("alpha", "beta"), patterns=("2:4", "8:16"), mitigations=("none", "shift"), failed_every=7))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def frame(folder: Path) -> pd.DataFrame:
    return load_results(folder)


def test_it_is_tidy_csv_with_more_columns(folder: Path, frame: pd.DataFrame) -> None:
    make_report(folder)
    assert frame[list(METRIC_COLUMNS)].to_csv(index=False) == (folder / "tidy.csv").read_text()
    assert not frame.duplicated(["cell_id", "task", "metric"]).any()


def test_every_number_stands_beside_its_dense_one(frame: pd.DataFrame) -> None:
    values = frame.set_index(["cell_id", "task", "metric"])["value"]
    sparse = frame[(frame["cell_id"] != frame["dense_cell_id"]) & frame["dense"].notna()]
    for row in sparse.to_dict("records"):
        dense = values[row["dense_cell_id"], row["task"], row["metric"]]
        assert row["dense"] == dense
        if row["metric"] == "perplexity":
            assert row["ratio"] == row["value"] / dense
            assert np.isnan(row["drop"])
        else:
            assert row["drop"] == dense - row["value"]
            assert row["relative_drop"] == row["drop"] / dense
            assert np.isnan(row["ratio"])
        shown = row["ratio"] if row["metric"] == "perplexity" else row["drop"]
        assert row["low"] <= shown <= row["high"]
    assert set(sparse["metric"]) == {"acc", "acc_norm", "perplexity"}
    dense_rows = frame[frame["pattern"] == "dense"]
    assert dense_rows[["drop", "relative_drop", "ratio", "low", "high"]].isna().all(axis=None)


def test_its_intervals_are_those_of_the_report(folder: Path, frame: pd.DataFrame) -> None:
    scores = make_scores(read_results(folder), []).per_task.merge(frame, on=["cell_id", "task", "metric"])
    is_text = scores["metric"] == "perplexity"
    for end in ("low", "high"):
        expected = scores[f"ratio_{end}"].where(is_text, scores[f"drop_{end}"])
        assert scores[end].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6, nan_ok=True)
    assert set(scores["task"]) == set(MINI)


def test_parameters_of_methods_are_columns(tmp_path: Path) -> None:
    make_results(tmp_path, Plan(models=("alpha",), patterns=("2:4",), mitigations=("none", "shift"), tasks=("mini_yesno",)))  # fmt: skip
    for file in tmp_path.glob("cells/*_shift_*/config.yaml"):
        text = file.read_text().replace("shift: {}", "shift:\n    stat: median").replace("name: act", "name: act\n  floor: 0.5")  # fmt: skip
        file.write_text(text)
    frame = load_results(str(tmp_path)).set_index("mitigation")
    assert frame.loc["shift", "mitigations.shift.stat"] == "median"
    assert frame.loc["shift", "criterion.floor"] == 0.5
    assert frame.loc["none", ["mitigations.shift.stat", "criterion.floor"]].isna().all(axis=None)
    assert frame.groupby("mitigation").size().to_dict() == {"none": 2, "shift": 1}


def test_items_give_the_metrics_and_stand_beside_the_dense_ones(folder: Path, frame: pd.DataFrame) -> None:
    items = load_results(folder, items=True)
    assert not items.duplicated(["cell_id", "task", "item"]).any()
    accuracies = items[items["metric"] != "perplexity"]
    means = accuracies.groupby(["cell_id", "task", "metric"])[["correct", "dense_correct"]].mean()
    expected = frame.set_index(["cell_id", "task", "metric"]).loc[means.index]
    assert means["correct"].to_numpy() == pytest.approx(expected["value"].to_numpy())
    assert means["dense_correct"].to_numpy() == pytest.approx(expected["dense"].to_numpy())
    choices = accuracies[accuracies["metric"] == "acc"]
    assert choices["correct"].tolist() == (choices["prediction"] == choices["gold"].astype(int)).tolist()
    assert choices["loglikelihoods"].map(np.argmax).tolist() == choices["prediction"].tolist()
    texts = items[items["metric"] == "perplexity"].groupby("cell_id")[["nll", "dense_nll", "n_tokens"]].sum()
    ppl = frame[frame["metric"] == "perplexity"].set_index("cell_id").loc[texts.index]
    assert np.exp(texts["nll"] / texts["n_tokens"]).to_numpy() == pytest.approx(ppl["value"].to_numpy())
    assert np.exp(texts["dense_nll"] / texts["n_tokens"]).to_numpy() == pytest.approx(ppl["dense"].to_numpy())


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    for items in (False, True):
        with pytest.raises(InputError, match="has no finished cell"):
            load_results(tmp_path, items=items)


def test_records_that_cannot_be_read_are_warned_of(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "results")
    first, second = sorted((tmp_path / "results" / "cells").glob("*_2-4_*"))[:2]
    (first / "provenance.json").unlink()
    (second / "samples.parquet").write_bytes(b"PAR1")
    for items in (False, True):
        with warnings.catch_warnings(record=True, action="always") as caught:
            frame = load_results(tmp_path / "results", items=items)
        said = [str(warning.message) for warning in caught]
        assert [any(place.name in message for message in said) for place in (first, second)] == [True, True]
        assert first.name.rpartition("_")[2] not in set(frame["cell_id"])
        rows = frame[frame["cell_id"] == second.name.rpartition("_")[2]]
        if items:
            assert rows.empty
        else:
            assert rows["drop"].notna().any()
            assert rows["low"].isna().all()


def test_the_example_of_the_guide_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (example,) = re.findall(r"```python\n(.*?load_results.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder.parent)
    # the name that the guide imports is the package's; here it is the function itself
    exec(example.replace("from nmsweep import", "from nmsweep.report.numbers.frame import"), {})
    said = capsys.readouterr().out
    assert "8:16" in said
    assert "shift" in said


def test_the_guide_names_every_column(folder: Path, frame: pd.DataFrame) -> None:
    text = GUIDE.read_text()
    for name in {*frame, *load_results(folder, items=True)}:
        if not name.startswith(("criterion.", "mitigations.")):
            assert f"`{name}`" in text, name
            assert f"`{name}`" in (load_results.__doc__ or ""), name
