"""The whole command line on tiny models: real records, real errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from nmsweep.results.record import METRIC_COLUMNS, cell_folders, read_cell

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float32", "eval.limit=4", "eval.seqlen=32")


def cells(results: Path) -> dict[str, Path]:
    """Finished cells by the words of their folder's name, the id left out."""
    return {folder.name.rpartition("_")[0]: folder for folder in cell_folders(results)}


def test_one_cell_runs_with_its_dense_baseline(nmsweep: Call, results: Path) -> None:
    code, _, err = nmsweep(*TINY, "pattern=2:4", "mitigation=shift+var", f"results_dir={results}")
    assert code == 0, err
    found = cells(results)
    assert set(found) == {"tiny-llama_dense_none_none", "tiny-llama_2-4_act_shift+var"}
    sparse, dense = read_cell(found["tiny-llama_2-4_act_shift+var"]), read_cell(found["tiny-llama_dense_none_none"])
    assert list(sparse.metrics.columns) == list(METRIC_COLUMNS)
    assert set(sparse.metrics["dense_cell_id"]) == {dense.cell_id}
    assert set(sparse.metrics["task"]) == {
        "mini_cloze",
        "mini_continuation",
        "mini_prose",
        "mini_science",
        "mini_yesno",
    }
    assert (sparse.layers["sparsity"] == 0.5).all()
    assert (sparse.metrics["sparsity"] == 0.5).all()
    assert dense.metrics["sparsity"].eq(0).all()
    assert not len(dense.layers)
    assert 0 < sparse.metrics["flops_share"].iloc[0] < 1
    assert not list((results / "cells").glob(".tmp*"))


@pytest.mark.parametrize("pattern", ["1:4", "3:4", "2:8", "4:4"])
def test_realised_sparsity_is_exactly_that_of_the_pattern(nmsweep: Call, results: Path, pattern: str) -> None:
    words = (*TINY, f"pattern={pattern}", "tasks=mini_science", "baseline=false", f"results_dir={results}")
    assert nmsweep(*words)[0] == 0
    (folder,) = cell_folders(results)
    n, m = map(int, pattern.split(":"))
    assert (read_cell(folder).layers["sparsity"] == 1 - n / m).all()


def test_a_sweep_loads_the_model_once_and_runs_nothing_twice(nmsweep: Call, results: Path) -> None:
    words = (
        "-m",
        *TINY,
        "pattern=2:4,8:16",
        "mitigation=none,shift,var",
        "tasks=mini_science",
        f"results_dir={results}",
    )
    code, _, err = nmsweep(*words)
    assert code == 0, err
    assert len(cells(results)) == 7
    logs = "".join(file.read_text() for file in results.glob(".runs/**/*.log"))
    assert logs.count("model load") == 1
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()}
    code, _, err = nmsweep(*words)
    assert code == 0
    assert "all 7 cells exist" in err
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()} == before


def test_adding_a_task_computes_one_task(nmsweep: Call, results: Path) -> None:
    base = (*TINY, "pattern=2:4", "baseline=false", f"results_dir={results}")
    assert nmsweep(*base, "tasks=mini_science")[0] == 0
    (first,) = (results / ".parts").glob("*/mini_science/part.json")
    written = first.stat().st_mtime_ns
    assert nmsweep(*base, "tasks=mini_science+mini_cloze")[0] == 0
    assert first.stat().st_mtime_ns == written
    assert len(cell_folders(results)) == 2


def test_forcing_runs_a_cell_again_and_gives_the_same_bytes(nmsweep: Call, results: Path) -> None:
    words = (*TINY, "pattern=2:4", "tasks=mini_science", "baseline=false", f"results_dir={results}")
    assert nmsweep(*words)[0] == 0
    (folder,) = cell_folders(results)
    numbers, finished = (folder / "metrics.csv").read_bytes(), (folder / "provenance.json").stat().st_mtime_ns
    assert nmsweep(*words, "force=true")[0] == 0
    assert (folder / "metrics.csv").read_bytes() == numbers
    assert (folder / "provenance.json").stat().st_mtime_ns > finished


def test_a_failed_cell_is_recorded_and_the_sweep_goes_on(
    nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nmsweep.evaluate import harness

    measure = harness.measure

    def fail_when_shifted(model: object, *args: object, **kwargs: object) -> object:
        layer = next(m for m in model.modules() if type(m).__name__ == "SparseLinear")  # type: ignore[attr-defined]
        if layer.slots.eta is not None:
            raise RuntimeError("boom")
        return measure(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "measure", fail_when_shifted)
    words = (
        "-m",
        *TINY,
        "pattern=2:4",
        "mitigation=shift,none",
        "tasks=mini_science",
        "baseline=false",
        f"results_dir={results}",
    )
    code, _, err = nmsweep(*words)
    assert code == 1
    assert "boom" in err
    assert set(cells(results)) == {"tiny-llama_2-4_act_none"}
    (failed,) = (results / "failed").iterdir()
    assert "boom" in json.loads((failed / "provenance.json").read_text())["error"]
    monkeypatch.setattr(harness, "measure", measure)
    assert nmsweep(*words)[0] == 0
    assert set(cells(results)) == {"tiny-llama_2-4_act_none", "tiny-llama_2-4_act_shift"}
    assert not list((results / "failed").iterdir())


def test_a_model_that_gives_nan_is_a_failed_cell(nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsweep.cell import session

    load = session.load_model

    def broken(*args: object, **kwargs: object) -> object:
        loaded = load(*args, **kwargs)  # type: ignore[arg-type]
        next(loaded.model.parameters()).data.fill_(float("nan"))
        return loaded

    monkeypatch.setattr(session, "load_model", broken)
    for task in ("mini_science", "mini_prose"):
        code, _, err = nmsweep(*TINY, "pattern=dense", f"tasks={task}", f"results_dir={results}")
        assert code == 1
        assert "not finite" in err
    assert not cell_folders(results)


def test_a_mirror_serves_the_papers_tasks_and_names_what_it_lacks(nmsweep: Call, results: Path, mirror: Path) -> None:
    words = (
        *TINY,
        "pattern=8:16",
        "mitigation=shift",
        "tasks=paper",
        f"data.mirror={mirror}",
        "baseline=false",
        f"results_dir={results}",
    )
    code, _, err = nmsweep(*words)
    assert code == 2
    assert "piqa" in err
    assert not results.exists()
    code, _, err = nmsweep(*words, "eval.skip_missing=true")
    assert code == 0, err
    assert err.count("piqa is left out") == 1
    (folder,) = cell_folders(results)
    assert set(pd.read_csv(folder / "metrics.csv")["task"]) == {
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "winogrande",
        "boolq",
        "wikitext2",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pattern=0:4"], "0:4"), (["pattern=5:4"], "5:4"), (["pattern=8-16"], "8-16"), (["pattern=150%"], "150%"),
        (["pattern=3:5"], "not a multiple of 5"), (["model=tiny-lama"], "tiny-llama"), (["criterion=acct"], "act"), (["mitigation=shit"], "shift"),
        (["tasks=arc_esy"], "arc_easy"), (["targets=*.nope.*"], "down_proj"), (["mitigation=var+var"], "2 times"), (["pattrn=2:4"], "pattern"),
        (["mitigations.shift.stat=mode", "mitigation=shift"], "median"), (["results_dir=/dev/null/x"], "results_dir"),
        (["pattern=dense", "mitigation=shift"], "no effect"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2_and_nothing_written(
    nmsweep: Call, results: Path, words: list[str], expected: str
) -> None:
    base = [word for word in TINY if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    place = [] if any("results_dir" in word for word in words) else [f"results_dir={results}"]
    code, out, err = nmsweep(*base, *words, *place)
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not results.exists()


def test_a_mirror_without_the_task_is_refused(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = nmsweep(*TINY, "tasks=boolq", f"data.mirror={tmp_path / 'empty'}", f"results_dir={results}")
    assert code == 2
    assert "boolq/validation.jsonl" in err


def test_a_corrupt_gguf_is_refused(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\x00" * 64)
    code, _, err = nmsweep(f"model.path={file}", f"results_dir={results}")
    assert code == 2
    assert "broken.gguf" in err
    assert len(err.strip().splitlines()) == 1


def test_report_writes_tables_and_a_plot(nmsweep: Call, results: Path) -> None:
    assert nmsweep("-m", *TINY, "pattern=2:4,8:16", "tasks=mini_science+mini_prose", f"results_dir={results}")[0] == 0
    code, out, err = nmsweep("report", f"results_dir={results}")
    assert code == 0, err
    tidy = pd.read_csv(results / "tidy.csv")
    assert list(tidy.columns) == list(METRIC_COLUMNS)
    assert tidy["cell_id"].nunique() == 3
    assert "8:16" in (results / "report" / "summary.md").read_text()

    assert "mini tasks" in out


def test_a_report_of_nothing_says_so(nmsweep: Call, tmp_path: Path) -> None:
    code, _, err = nmsweep("report", f"results_dir={tmp_path}")
    assert code == 2
    assert "no finished cell" in err


def test_list_shows_every_choice(nmsweep: Call) -> None:
    code, out, _ = nmsweep("list")
    assert code == 0
    for name in ("smollm2", "tiny-llama", "act", "shift", "var", "paper", "8:16" and "N:M"):
        assert name in out


def test_a_users_own_criterion_is_one_file_and_one_yaml(
    nmsweep: Call, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from nmsweep.methods.base import Criterion\n\n"
        "@dataclass(frozen=True)\n"
        "class First(Criterion):\n"
        "    '''Keeps the lower channels of a group. Source: nobody.'''\n"
        "    power: float = 4.0\n\n"
        "    def weight(self, layer, state):\n"
        "        n = layer.weight.shape[1]\n"
        "        return torch.arange(n, 0, -1).float() ** self.power\n"
    )
    (tmp_path / "conf" / "criterion").mkdir(parents=True)
    (tmp_path / "conf" / "criterion" / "first.yaml").write_text(
        "# Lower channels first.\nname: first\n_target_: mine.First\npower: 4.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (
        "--config-dir",
        str(tmp_path / "conf"),
        *TINY,
        "criterion=first",
        "tasks=mini_science",
        "baseline=false",
        f"results_dir={results}",
    )
    code, _, err = nmsweep(*words)
    assert code == 2
    assert "plugins=[mine]" in err
    code, _, err = nmsweep(*words, "plugins=[mine]")
    assert code == 0, err
    assert set(cells(results)) == {"tiny-llama_8-16_first_none"}


def test_a_model_that_cannot_be_loaded_is_tried_once(
    nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nmsweep.cell import session
    from nmsweep.errors import ModelError

    tried = []

    def refuse(*args: object, **kwargs: object) -> object:
        tried.append(args)
        raise ModelError("model tiny-llama: its tokenizer is damaged; take another")

    monkeypatch.setattr(session, "load_model", refuse)
    words = ("-m", *TINY, "pattern=2:4,4:8", "tasks=mini_science", "baseline=false", f"results_dir={results}")
    code, _, err = nmsweep(*words)
    assert code == 1
    assert err.count("tokenizer is damaged") >= 2
    assert len(tried) == 1
    assert len(list((results / "failed").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("--cfg job", 0, "criterion:"),
        ("--cfg job --package eval --resolve", 0, "seqlen: 2048"),
        ("--cfg hydra hydra/launcher=joblib", 0, "nmsweep.sweep.executors.local.WorkerProcesses"),
        ("--info defaults", 0, "hydra/launcher"),
        ("--help", 0, "Groups (one file an option: group=option):"),
        ("--hydra-help", 0, "--shell-completion"),
        ("--shell-completion install=bash", 0, "hydra_bash_completion"),
        ("--version", 0, "Hydra 1."),
        ("--config-name other", 2, "choose a file with experiment=NAME"),
        ("-cp other", 2, "add options of yours with --config-dir DIR"),
        ("--resolve", 2, "goes with --cfg or --help"),
        ("--experimental-rerun config.pickle", 2, "`nmsweep retry` gives the words of the latest sweep again"),
        ("--nothing", 2, "no such option; see `nmsweep --help`"),
        ("-m --config-dir", 2, "expected one argument"),
        ("hydra.job.chdir=true", 2, "has no effect, as Hydra only composes; allowed: hydra.launcher"),
    ],
)
def test_hydras_own_options_work_or_say_what_to_use(nmsweep: Call, words: str, code: int, expected: str) -> None:
    ended, out, err = nmsweep(*words.split())
    assert ended == code, err
    assert expected in (err if code else out)
    if code:
        assert err.count("\n") == 1


def test_options_may_stand_between_overrides(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npattern: '2:4'\nhydra: {mode: MULTIRUN, sweeper: {params: {mitigation: 'none,shift'}}}\n"
    )
    words = ("plan", *TINY, "--config-dir", str(tmp_path / "own"), "experiment=mine", f"results_dir={results}")
    code, out, err = nmsweep(*words)
    assert code == 0, err
    assert "3 cells, 0 exist" in out
