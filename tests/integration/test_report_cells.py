"""The report of real, tiny cells: its check, its commands, and a folder that a sweep writes to meanwhile."""

import shlex
import threading
from collections.abc import Callable
from pathlib import Path

import overhead
import pandas as pd
import pytest
from support.results_folder import Plan, make_results

from nmsweep.cell.identity import identify
from nmsweep.config.compose import cells_of
from nmsweep.report.numbers.scores import make_scores
from nmsweep.results.read import read_results

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float32", "eval.limit=4", "eval.seqlen=32")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of a tiny model on the mini tasks."""
    from nmsweep.cli import main

    folder = tmp_path_factory.mktemp("real") / "results"
    words = (
        "-m",
        *TINY,
        "pattern=2:4",
        "mitigation=none,shift+var",
        "mitigations.shift.stat=mean",
        "criterion=wina",
    )
    with pytest.raises(SystemExit) as ended:
        main([*words, f"results_dir={folder}"])
    assert ended.value.code in (0, None)
    return folder


def test_the_samples_of_real_cells_give_their_metrics(nmsweep: Call, real: Path) -> None:
    code, out, err = nmsweep("report", f"results_dir={real}", "--check")
    assert code == 0, out + err
    assert "0 differ, 0 cannot be recomputed" in out


def test_a_report_of_real_cells_writes_everything(nmsweep: Call, real: Path) -> None:
    code, out, err = nmsweep("report", f"results_dir={real}", "rows=mitigation", "cols=pattern", "metric=ratio")
    assert code == 0, err
    assert "mini tasks" in out
    folder = real / "report"
    for name in ("index.html", "summary.md", "cells.csv", "manifest.json", "hardware.csv", "tables/all.tex", "tables/mini/custom_ratio.tex", "figures/mini/drop_pattern.pdf"):  # fmt: skip
        assert (folder / name).stat().st_size > 100, name
    assert "shift+var" in (folder / "tables" / "mini" / "custom_ratio.md").read_text()
    view = pd.read_csv(folder / "hardware.csv").set_index("pattern")
    assert view.loc["2:4", "combinatorial_bits"] == 0.75
    assert view.loc["2:4", "compressed"] == pytest.approx(0.5 + 0.75 / 32)
    assert 0.5 < view.loc["2:4", "linear_flops_kept"] < 1


def test_a_multiplied_folder_is_that_of_a_sweep_over_models_and_seeds(
    nmsweep: Call, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "N_MODELS", 2)
    folder = tmp_path / "results"
    made = overhead.multiply(real, folder, 4 * 3 + 2)
    done = read_results(folder).done
    assert set(done.index) == {cell.cell_id for cell in made.cells}
    copies = done.groupby(["model", "seed"]).size()
    assert copies.to_dict() == {("tiny-llama-0", 0): 3, ("tiny-llama-1", 0): 3, ("tiny-llama-0", 1): 3, ("tiny-llama-1", 1): 3, ("tiny-llama-0", 2): 2}  # fmt: skip
    dense = done.loc[done["dense_cell_id"]]
    assert set(dense["pattern"]) == {"dense"}
    assert (dense[["model", "seed"]].to_numpy() == done[["model", "seed"]].to_numpy()).all()
    results = read_results(folder)
    for cell_id, config in results.configs.items():
        known = results.provenance[cell_id]
        assert (config["model"]["name"], config["seed"]) == (known["model"]["name"], known["seed"])
        assert results.cells.loc[cell_id, "place"].name.startswith(f"{config['model']['name']}_")
    assert "14 done" in nmsweep("status", f"results_dir={folder}")[1]
    code, out, err = nmsweep("report", f"results_dir={folder}", "--check")
    assert code == 0, out + err
    assert "0 differ, 0 cannot be recomputed" in out
    scores = make_scores(results, [])
    assert scores.per_task.loc[scores.per_task["cell_id"] != scores.per_task["dense_cell_id"], "dense"].notna().all()


def test_the_command_of_a_cell_gives_that_cell(real: Path) -> None:
    cells = pd.read_csv(real / "report" / "cells.csv", keep_default_na=False)
    results = read_results(real)
    assert set(cells["cell_id"]) == set(results.cells.index)
    for row in cells.to_dict("records"):
        words = shlex.split(row["rerun"])
        assert words[0] == "nmsweep"
        (cfg,) = cells_of(words[1:], multirun=False, config_dir=None)
        assert identify(cfg).cell_id == row["cell_id"], row["rerun"]


@pytest.mark.parametrize(
    "words",
    [
        ("criterion=amber", "criterion.drop_outliers=true", "scope=skip_first:4", "targets=[mlp,'!*.0.*']", "seed=3"),
        ("criterion=rms", "calibration.n_samples=3", "calibration.seqlen=16", "mitigation=bias_static"),
        ("pattern=dense", "dtype=float64", "eval.num_fewshot=0", "profile=paper"),
    ],
)
def test_the_command_keeps_every_setting(words: tuple[str, ...]) -> None:
    from nmsweep.report.page.rerun import rerun_command

    (cfg,) = cells_of([*TINY, *words], multirun=False, config_dir=None)
    again = shlex.split(rerun_command(cfg.dump()))[1:]
    (same,) = cells_of(again, multirun=False, config_dir=None)
    assert identify(same).cell_id == identify(cfg).cell_id, again


def test_a_comparison_of_a_folder_with_itself_finds_nothing(nmsweep: Call, real: Path) -> None:
    code, out, _ = nmsweep("report", "--compare", str(real), str(real))
    assert code == 0
    assert " same" in out
    assert "beyond noise" not in out


def test_a_report_works_while_cells_are_written(nmsweep: Call, results: Path) -> None:
    make_results(results, Plan(models=("alpha",), mitigations=("none",)))
    more = threading.Thread(target=make_results, args=(results, Plan(models=("beta",), mitigations=("none", "shift"))))
    more.start()
    try:
        while more.is_alive():
            code, _, err = nmsweep("report", f"results_dir={results}")
            assert code == 0, err
            assert "warning" not in err
    finally:
        more.join()
    assert nmsweep("report", f"results_dir={results}")[0] == 0
    assert {"alpha", "beta"} == set(pd.read_csv(results / "tidy.csv")["model"])
    assert not list(results.rglob(".tmp*"))
