"""Tables, statistics, checks and comparisons of made-up results folders."""

import csv
import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr
from support.results_folder import HOSTILE, MINI, REAL, Plan, make_results

from nmsweep.commands.report import main as report
from nmsweep.commands.report import parse_words
from nmsweep.errors import InputError
from nmsweep.report.numbers.check import check_results
from nmsweep.report.numbers.contrast import contrast
from nmsweep.report.numbers.quantities import QUANTITIES
from nmsweep.report.numbers.scores import Scores, make_scores
from nmsweep.report.show import formats
from nmsweep.report.show.spec import PRESETS, TableSpec, parse_spec
from nmsweep.report.show.tables import make_tables, preset_tables
from nmsweep.results.read import Results, read_results
from nmsweep.results.record import METRIC_COLUMNS
from nmsweep.results.samples import ItemGroup, read_groups
from nmsweep.statistics.comparison import compare, compare_cells, mean_replicates

PLAN = Plan(models=("alpha", "beta"), patterns=("2:4", "8:16", "50%"), mitigations=("none", "shift"), failed_every=5, missing_every=7)  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini and real tasks, failed and missing cells, two models."""
    folder = tmp_path_factory.mktemp("source") / "results"
    make_results(folder, PLAN)
    make_results(folder, Plan(models=("alpha",), patterns=("2:4", "8:16"), criteria=("act", "wanda"), mitigations=("none",), tasks=REAL, n_items=40))  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def results(source: Path) -> Results:
    return read_results(source)


@pytest.fixture(scope="session")
def scores(results: Results) -> Scores:
    return make_scores(results, [])


def cell(results: Results, **fields: str) -> str:
    cells = results.done
    for name, value in fields.items():
        cells = cells[cells[name] == value]
    assert len(cells) == 1
    return str(cells.index[0])


def test_everything_that_was_written_is_read(results: Results) -> None:
    n_sparse = len(list(PLAN.sparse()))
    failed, missing = {5, 10}, {7}
    assert (results.cells["status"] == "failed").sum() == len(failed)
    assert len(results.done) == 2 + n_sparse - len(failed) - len(missing) + 1 + 4
    assert not results.problems
    assert results.cells.loc[results.cells["status"] == "failed", "error"].str.contains("not finite").all()


def test_a_number_has_the_same_interval_in_the_report_and_in_the_comparison_of_two_cells(
    results: Results, scores: Scores
) -> None:
    sparse = cell(results, model="alpha", pattern="2:4", mitigation="none", criterion="act", tasks="+".join(MINI))
    place = results.cells["place"]
    dense = results.cells.loc[sparse, "dense_cell_id"]
    two = compare(*(pd.read_parquet(place[name] / "samples.parquet") for name in (dense, sparse)))
    two = two.set_index(["task", "metric"])
    many = scores.per_task[scores.per_task["cell_id"] == sparse].set_index(["task", "metric"])
    assert len(many) == len(MINI)
    for name in set(two) - {"n_items"}:
        expected = two[name].reindex(many.index).to_numpy(float)
        # float32 replicates, whose sums depend on the shape of the product
        assert many[name].to_numpy(float) == pytest.approx(expected, rel=1e-6, nan_ok=True), name
    for name in ("drop_low", "drop_high"):
        assert many[name].equals(two[name].reindex(many.index)), "sums of right answers are exact"
    drops = many["drop"].notna()
    assert many.loc[drops, ["drop_low", "drop_high", "relative_low", "relative_high"]].notna().all(axis=None)


def test_the_interval_of_a_number_does_not_depend_on_the_other_cells(tmp_path: Path) -> None:
    plan = Plan(models=("alpha",), patterns=("2:4",), mitigations=("none",))
    make_results(tmp_path / "few", plan)
    make_results(tmp_path / "many", replace(plan, patterns=("2:4", "8:16", "50%"), mitigations=("none", "var"), seeds=(0, 1)))  # fmt: skip
    few, many = (make_scores(read_results(tmp_path / name), []) for name in ("few", "many"))
    keys = ["cell_id", "data", "is_text"]
    columns = ["drop_low", "drop_high", "relative_low", "relative_high", "ratio_low", "ratio_high"]
    first, second = (scores.per_cell.set_index(keys)[columns] for scores in (few, many))
    pd.testing.assert_frame_equal(first, second.loc[first.index], rtol=1e-6)
    assert first.notna().any(axis=None)


def test_means_over_tasks_come_from_the_items(results: Results, scores: Scores) -> None:
    """A path of its own: samples.parquet to mean drop, without metrics.csv."""
    sparse = cell(results, model="beta", pattern="8:16", mitigation="none", tasks="+".join(MINI))
    place = results.cells["place"]
    dense, own = (pd.read_parquet(place[one] / "samples.parquet") for one in (results.cells.loc[sparse, "dense_cell_id"], sparse))  # fmt: skip
    drops, relative = [], []
    for task in MINI:
        a, b = dense[dense["task"] == task], own[own["task"] == task]
        if task == "mini_prose":
            ratio = np.exp((b["nll"].sum() - a["nll"].sum()) / a["n_tokens"].sum())
            continue
        right = []
        for items in (a, b):
            hits = []
            for values, chars, gold in zip(items["loglikelihoods"], items["choice_chars"], items["gold"], strict=True):
                norm = chars if items["metric_acc_norm"].notna().all() else 1
                hits.append(np.argmax(values / norm) == int(gold))
            right.append(np.mean(hits))
        drops.append(right[0] - right[1])
        relative.append((right[0] - right[1]) / right[0])
    row = scores.per_cell[scores.per_cell["cell_id"] == sparse].set_index("is_text")
    assert row.loc[False, "drop"] == pytest.approx(np.mean(drops))
    assert row.loc[False, "relative_drop"] == pytest.approx(np.mean(relative))
    assert row.loc[True, "ratio"] == pytest.approx(ratio)
    (table,) = [t for t in make_tables(PRESETS[0], results, scores) if t.data == "mini"]
    entry = table.frame.loc[("8:16",), ("beta",)]
    assert entry.value == pytest.approx(np.mean(drops))
    assert entry.cells == (sparse,)
    assert entry.low <= entry.value <= entry.high


def groups_of(results: Results, task: str) -> list[ItemGroup]:
    files = {str(one): place / "samples.parquet" for one, place in results.done["place"].items()}
    return [group for group in read_groups(files, []) if group.task == task]


@pytest.mark.parametrize(("task", "metric"), [("boolq", "acc"), ("wikitext2", "perplexity")])
def test_resampled_means_are_centred_on_the_mean(results: Results, task: str, metric: str) -> None:
    for group in groups_of(results, task):
        means = mean_replicates(group, metric, list(group.rows))
        if metric == "perplexity":
            expected = group.values["nll"].sum(axis=1) / group.values["n_tokens"].sum(axis=1)
        else:
            expected = group.values[metric].mean(axis=1)
        assert means.mean(axis=1) == pytest.approx(expected, rel=0.02)
        alone = np.concatenate([mean_replicates(group, metric, [name]) for name in group.rows])
        assert alone == pytest.approx(means, rel=1e-6), "of one cell as of many"


def test_cells_are_compared_in_pairs_only(results: Results) -> None:
    groups = groups_of(results, "boolq")
    sparse = cell(results, pattern="2:4", criterion="wanda")
    dense = str(results.cells.loc[sparse, "dense_cell_id"])
    assert compare_cells(groups, {sparse: dense}, {"boolq": ["acc"]})["cell_id"].tolist() == [sparse]
    assert compare_cells(groups, {sparse: "unknown"}, {"boolq": ["acc"]}).empty
    assert compare_cells(groups, {}, {"boolq": ["acc"]}).empty


def test_a_cell_without_samples_takes_no_interval_from_others(tmp_path: Path) -> None:
    make_results(tmp_path, Plan(models=("alpha",), patterns=("2:4", "8:16"), mitigations=("none", "shift")))
    whole = make_scores(read_results(tmp_path), []).per_cell.set_index(["cell_id", "is_text"])
    lost = next(place for place in sorted((tmp_path / "cells").iterdir()) if "_2-4_" in place.name)
    (lost / "samples.parquet").unlink()
    again = make_scores(read_results(tmp_path), []).per_cell.set_index(["cell_id", "is_text"])
    is_lost = again.index.get_level_values("cell_id") == lost.name.rpartition("_")[2]
    for column in ("drop_low", "relative_high", "ratio_low"):
        assert again.loc[is_lost, column].isna().all()
        pd.testing.assert_series_equal(again.loc[~is_lost, column], whole.loc[~is_lost, column], rtol=1e-6)


def test_mini_and_real_are_never_in_one_table(results: Results, scores: Scores) -> None:
    tables = preset_tables(results, scores)
    assert {table.data for table in tables} == {"mini", "real"}
    kind = results.cells["tasks"].str.contains("mini_")
    for table in tables:
        cells = {one for entry in table.frame.to_numpy().ravel() for one in entry.cells}
        assert kind[list(cells)].eq(table.data == "mini").all(), table.name


def test_failed_and_missing_cells_are_shown_as_such(results: Results, scores: Scores) -> None:
    spec = parse_spec("mitigation", "pattern", "drop")
    (table,) = [t for t in make_tables(spec, results, scores) if t.data == "mini"]
    status = [entry.status for entry in table.frame.to_numpy().ravel()]
    assert (status.count("failed"), status.count("missing")) == (2, 1)
    text = formats.to_markdown(table)
    assert text.count("| failed |".replace("| ", " ").strip()) >= 2
    assert "–: no cell was run" in text
    assert "failed: its cell failed" in text


def test_the_best_is_bold_and_what_is_not_worse_is_marked(results: Results, scores: Scores) -> None:
    (table,) = [t for t in make_tables(parse_spec("mitigation", "pattern", "ratio"), results, scores) if t.data == "mini"]  # fmt: skip
    for column in table.frame.columns:
        for _, rows in table.frame[column].groupby(level="model"):
            done = [entry for entry in rows if entry.status == "done"]
            if len(done) > 1:
                assert [entry.best for entry in done] == [entry.value == min(e.value for e in done) for entry in done]
                assert not any(entry.tied for entry in done), "windows of one text differ clearly"
    tied = [
        e
        for t in preset_tables(results, scores)
        if t.quantity.name == "drop"
        for e in t.frame.to_numpy().ravel()
        if e.tied
    ]
    assert tied, "32 items cannot tell everything apart"


def test_two_cells_of_one_score_are_both_best_and_one_equal_to_the_best_is_not_worse(tmp_path: Path) -> None:
    make_results(tmp_path, Plan(models=("alpha",), patterns=("8:16",), mitigations=("none",), seeds=(0, 1)))
    results = read_results(tmp_path)
    scores = make_scores(results, [])
    (table,) = make_tables(parse_spec("pattern", "model", "drop"), results, scores)
    (entry,) = table.frame.to_numpy().ravel()
    assert len(entry.cells) == 2, "seeds are averaged"
    values = scores.per_cell.set_index(["cell_id", "is_text"])["drop"]
    assert entry.value == pytest.approx(np.mean([values[one, False] for one in entry.cells]))
    assert entry.low <= entry.value <= entry.high


def test_cells_that_differ_by_a_setting_are_not_mixed(tmp_path: Path) -> None:
    plan = Plan(models=("alpha",), patterns=("8:16",), mitigations=("none",))
    make_results(tmp_path, plan)
    make_results(tmp_path, replace(plan, n_items=20))
    results = read_results(tmp_path)
    assert set(results.done["variant"]) == {"eval.limit=32", "eval.limit=20"}
    (table,) = make_tables(parse_spec("pattern", "model", "drop"), results, make_scores(results, []))
    assert table.front == ("variant",)
    assert all(len(entry.cells) <= 1 for entry in table.frame.to_numpy().ravel())


def test_a_long_table_is_cut_where_people_read_it_and_whole_as_csv(
    results: Results, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MOST_ROWS", 3)
    (table,) = [t for t in make_tables(parse_spec("mitigation+pattern", "model", "drop"), results, scores) if t.data == "mini"]  # fmt: skip
    n_rows, n_columns = table.frame.shape
    said = f"{n_rows - 3} more rows are left out: "
    text = formats.to_markdown(table)
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 3
    assert text.endswith(said + "custom\\_drop.csv has them all\n")
    for label, key in zip(table.frame.index[:3], text.splitlines()[4:], strict=False):
        assert all(str(part) in key.replace("\\", "") for part in label), "the first in reading order"
    assert formats.html_document(table).count("<tr>") == 2 + 3
    assert said + "custom_drop.csv" in formats.html_document(table)
    assert said + r"custom\_drop.csv" in formats.to_latex(table, "tab:x")
    assert len(formats.to_csv(table)) == n_rows * n_columns
    monkeypatch.setattr(formats, "MOST_ROWS", n_rows)
    assert "left out" not in formats.legend(table)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "results"
    make_results(folder, Plan(models=("alpha", *HOSTILE), patterns=("2:4", "8:16"), mitigations=("none",)))
    return folder


def test_hostile_names_break_no_format(hostile: Path) -> None:
    results = read_results(hostile)
    for table in preset_tables(results, make_scores(results, [])):
        text = formats.to_markdown(table)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        bars = {line.replace("\\|", "").count("|") for line in lines}
        assert len(bars) == 1, "every row has as many columns"
        assert "<script" not in text
        page = formats.html_document(table)
        assert "<script" not in page
        assert "<img" not in page
        again = list(csv.DictReader(io.StringIO(formats.to_csv(table).to_csv(index=False))))
        assert {row["model"] for row in again} == {"alpha", *HOSTILE}
        latex = formats.to_latex(table, "tab:x")
        assert latex.isascii() or "‘" in latex
        for line in latex.splitlines():
            assert line.replace("\\&", "").count("&") in (0, len(table.frame.columns) + table.frame.index.nlevels - 1)


def test_a_damaged_record_is_named_and_the_rest_is_reported(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    first, second, third = sorted(place for place in (folder / "cells").iterdir() if "dense" not in place.name)[:3]
    (first / "metrics.csv").write_bytes(b'cell_id,"\xff')
    (second / "samples.parquet").write_bytes(b"PAR1")
    (third / "provenance.json").unlink()
    results = read_results(folder)
    problems = list(results.problems)
    scores = make_scores(results, problems)
    said = "\n".join(problems)
    for place in (first, second, third):
        assert place.name in said
    assert len(results.done) == len(read_results(source).done) - 2
    no_samples = scores.per_task[scores.per_task["cell_id"] == second.name.rpartition("_")[2]]
    assert no_samples["drop_low"].isna().all()
    assert no_samples["drop"].notna().any(), "metrics.csv has its numbers"


def test_a_record_of_an_older_schema_loads_and_a_newer_one_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    old, new = sorted(place for place in (folder / "cells").iterdir() if "dense" not in place.name)[:2]
    table = pd.read_csv(old / "metrics.csv", dtype=str, keep_default_na=False).drop(columns=["operand", "profile", "seed"])  # fmt: skip
    table.to_csv(old / "metrics.csv", index=False)
    provenance = json.loads((new / "provenance.json").read_text())
    (new / "provenance.json").write_text(json.dumps({**provenance, "schema": 999}))
    results = read_results(folder)
    assert old.name.rpartition("_")[2] in results.done.index
    assert new.name.rpartition("_")[2] not in results.done.index
    assert "schema 999" in results.problems[0]
    make_scores(results, [])


def test_a_check_confirms_every_number_and_finds_a_changed_one(source: Path, tmp_path: Path) -> None:
    checked = check_results(read_results(source))
    assert not checked.wrong
    assert not checked.unknown
    assert checked.n_equal == len(read_results(source).tidy) + len(read_results(source).done)
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    place = next(place for place in sorted((folder / "cells").iterdir()) if "dense" not in place.name)
    text = pd.read_csv(place / "metrics.csv", dtype=str, keep_default_na=False)
    text.loc[0, "value"] = str(float(text.loc[0, "value"]) + 1e-6)
    text.to_csv(place / "metrics.csv", index=False)
    file, finding = check_results(read_results(folder)).wrong
    assert file.task == "metrics.csv", "its digest is in provenance.json"
    assert finding.cell_id == text.loc[0, "cell_id"]
    assert (finding.task, finding.metric) == (text.loc[0, "task"], text.loc[0, "metric"])
    assert report([f"results_dir={folder}", "--check"]) == 1
    assert report([f"results_dir={source}", "--check"]) == 0


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_checked_and_resampled_as_it_was_pooled(tmp_path: Path, by_size: bool) -> None:
    make_results(tmp_path, Plan(models=("alpha",), patterns=("2:4",), mitigations=("none",), tasks=("boolq",), n_items=200))  # fmt: skip
    sizes = {"small": 20, "large": 180}
    subtask = [name for name, size in sizes.items() for _ in range(size)]
    for place in (tmp_path / "cells").iterdir():
        samples = pd.read_parquet(place / "samples.parquet").assign(subtask=subtask)
        right = [samples["metric_acc"][samples["subtask"] == name] for name in sizes]
        errors = [float(part.std()) / len(part) ** 0.5 for part in right]
        if not by_size:
            samples["weight_acc"] = [1 / (len(sizes) * sizes[name]) for name in subtask]
        samples.to_parquet(place / "samples.parquet", index=False)
        metrics = pd.read_csv(place / "metrics.csv", dtype=str, keep_default_na=False)
        metrics["value"] = np.average(
            [part.mean() for part in right], weights=list(sizes.values()) if by_size else None
        )
        metrics["stderr"] = pooled_sample_stderr(errors, list(sizes.values())) if by_size else unweighted_mean_stderr(errors)  # fmt: skip
        metrics.to_csv(place / "metrics.csv", index=False)
    results = read_results(tmp_path)
    checked = check_results(results)
    assert {finding.metric for finding in checked.wrong} == {"sha256"}, "only the files are others than were written"
    assert not checked.unknown
    scores = make_scores(results, [])
    sparse = cell(results, pattern="2:4")
    places = [results.cells["place"][name] for name in (results.cells["dense_cell_id"][sparse], sparse)]
    row = scores.per_task.set_index("cell_id").loc[sparse]
    two = compare(*(pd.read_parquet(place / "samples.parquet") for place in places)).iloc[0]
    for name in ("value", "dense", "drop", "drop_low", "drop_high", "relative_low", "relative_high"):
        assert row[name] == pytest.approx(two[name], rel=1e-5), name
    assert row["drop_low"] < row["drop"] < row["drop_high"]
    if not by_size:  # half of the mean is that of 20 items
        width = row["drop_high"] - row["drop_low"]
        assert width > 0.1


def test_a_comparison_tells_change_from_noise(tmp_path: Path) -> None:
    plan = Plan(models=("alpha",), patterns=("2:4", "8:16"), mitigations=("none",), n_items=200)
    a, b = tmp_path / "a", tmp_path / "b"
    make_results(a, plan)
    shutil.copytree(a, b)
    same = contrast(a, b)
    assert set(same.rows["verdict"]) == {"same"}
    assert not same.only_a
    place = next(place for place in (b / "cells").iterdir() if "_2-4_" in place.name)
    samples = pd.read_parquet(place / "samples.parquet")
    metrics = pd.read_csv(place / "metrics.csv")
    for task, n_changed in (("mini_yesno", 60), ("mini_cloze", 1)):
        rows = samples.index[(samples["task"] == task) & (samples["metric_acc"] == 1)][:n_changed]
        samples.loc[rows, "metric_acc"] = 0.0
        metrics.loc[metrics["task"] == task, "value"] -= n_changed / 200
    samples.to_parquet(place / "samples.parquet", index=False)
    metrics.to_csv(place / "metrics.csv", index=False)
    shutil.rmtree(next(place for place in (b / "cells").iterdir() if "_8-16_" in place.name))
    difference = contrast(a, b)
    verdicts = difference.rows[difference.rows["verdict"] != "same"].set_index("task")
    assert verdicts["verdict"].to_dict() == {"mini_yesno": "beyond noise", "mini_cloze": "noise"}
    assert verdicts.loc["mini_yesno", "change"] == pytest.approx(-0.3)
    assert verdicts.loc["mini_yesno", "high"] < 0
    assert len(difference.only_a) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["row=pattern"], "allowed: results_dir=…, rows=…"), (["rows=patern"], "did you mean pattern"), (["metric=dropp"], "did you mean drop"),
        (["rows=pattern", "cols=pattern"], "name it once"), (["--compare", "a"], "expected 2 arguments; allowed: --check, --compare A B"),
        (["--check=perhaps"], "allowed: --check"), (["rows="], "nothing is named"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        parse_words(words)
    assert len(caught.value.messages) == 1


def test_words_may_carry_the_groups_name() -> None:
    options, results_dir, table = parse_words(
        ["report.rows=criterion+mitigation", "--check", "report.cols=pattern", "results_dir=x"]
    )
    assert options.check
    assert results_dir == Path("x")
    assert table == TableSpec("custom", "Criterion, mitigation and pattern", ("criterion", "mitigation"), ("pattern",))  # fmt: skip
    options, _, table = parse_words(["--compare", "a", "b"])
    assert options.compare == [Path("a"), Path("b")]
    assert table is None


def test_a_report_writes_every_file_and_each_number_leads_to_its_cell(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    assert report([f"results_dir={folder}", "rows=mitigation", "cols=pattern"]) == 0
    cells = pd.read_csv(folder / "report" / "cells.csv", keep_default_na=False).set_index("cell_id")
    for table in sorted((folder / "report" / "tables").rglob("*.csv")):
        for ids in pd.read_csv(table, keep_default_na=False)["cells"]:
            assert set(filter(None, ids.split("+"))) <= set(cells.index)
    assert all(shlex.split(command)[0] == "nmsweep" for command in cells["rerun"])
    made_of = json.loads((folder / "report" / "manifest.json").read_text())
    assert set(made_of["tasks"]) == {*MINI, *REAL}
    assert made_of["versions"]["torch"] == {"2.11.0": int(cells["status"].eq("done").sum())}
    assert (folder / "report" / "tables" / "mini" / "custom_drop.md").is_file()


def test_bit_identical_cells_of_different_methods_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    make_results(tmp_path, Plan(models=("alpha",), patterns=("8:16",), mitigations=("none", "var")))
    assert report([f"results_dir={tmp_path}"]) == 0
    assert "identity watch" not in capsys.readouterr().out
    first, second = sorted(place for place in (tmp_path / "cells").iterdir() if "dense" not in place.name)
    own, other = (json.loads((place / "provenance.json").read_text()) for place in (first, second))
    own["tasks"]["mini_yesno"] = other["tasks"]["mini_yesno"]
    (first / "provenance.json").write_text(json.dumps(own))
    assert report([f"results_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "identity watch: mini_yesno has bit-identical scores" in said
    for file in ("summary.md", "index.html"):
        assert "bit-identical" in (tmp_path / "report" / file).read_text()


def test_the_guide_names_every_column_and_quantity() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reading-results.md").read_text()
    for name in (*METRIC_COLUMNS, *QUANTITIES):
        assert f"`{name}`" in text, name


def test_sensitivity_tables_become_a_table_and_a_figure(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    (folder / "sensitivity").mkdir()
    rows = [
        {"layer": f"model.layers.{block}.{name}", "block": block, "projection": name, "pattern": "2:4", "criterion": "act",
         "mitigation": "none", "relative_error": 0.1 * (block + 1), "flops_share": 0.1, "skip": 0}
        for block in range(3) for name in ("q_proj", "down_proj")
    ]  # fmt: skip
    name = "alpha_2-4_act_none_0123456789ab"
    pd.DataFrame(rows).to_csv(folder / "sensitivity" / f"{name}.csv", index=False)
    (folder / "sensitivity" / "broken.csv").write_text("layer\n")
    assert report([f"results_dir={folder}"]) == 0
    text = (folder / "report" / "tables" / "layers" / f"{name}_error.md").read_text()
    assert "| **0.100** |" in text
    assert (folder / "report" / "figures" / "layers" / "error.pdf").stat().st_size > 1000
    assert "sensitivity broken.csv" in (folder / "report" / "summary.md").read_text().replace("\\", "")


def test_a_record_whose_pattern_is_none_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    place = next(place for place in sorted((folder / "cells").iterdir()) if "_2-4_" in place.name)
    text = (place / "metrics.csv").read_text()
    (place / "metrics.csv").write_text(text.replace(",2:4,", ",2;4,"))
    results = read_results(folder)
    assert any(place.name in problem and "2;4" in problem for problem in results.problems)
    assert place.name.rpartition("_")[2] not in results.done.index


def test_records_without_samples_are_reported_without_intervals(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(source, folder)
    for file in folder.glob("cells/*/samples.parquet"):
        file.unlink()
    results, problems = read_results(folder), []
    scores = make_scores(results, problems)
    assert len(problems) == 1
    assert "missing in" in problems[0]
    assert scores.per_cell["drop"].notna().any()
    assert scores.per_cell["drop_low"].isna().all()
    checked = check_results(results)
    assert not checked.wrong
    assert len(checked.unknown) == len(results.done)


def test_texts_alone_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    make_results(
        folder, Plan(models=("alpha",), patterns=("2:4", "8:16"), mitigations=("none",), tasks=("mini_prose",))
    )
    assert report([f"results_dir={folder}"]) == 0
    scores = make_scores(read_results(folder), [])
    assert scores.per_cell["ratio_low"].notna().sum() == 2
    assert scores.per_task["p_holm"].isna().all()
