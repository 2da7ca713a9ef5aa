"""nmsweep inside lm-eval: the same numbers as nmsweep's own run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.api.instance import Instance

from nmsweep.data.tasks import MINI_FOLDER
from nmsweep.errors import InputError
from nmsweep.lm_eval import NMSweepLM, model_words
from nmsweep.results.record import CellRecord, cell_folders, read_cell

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def yamls(tmp_path: Path) -> Path:
    """A folder with a task over the shipped science items."""
    folder = tmp_path / "yamls"
    folder.mkdir()
    config = {
        "task": "own_science", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(MINI_FOLDER / "science.jsonl")}},
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (folder / "own_science.yaml").write_text(yaml.safe_dump(config))
    return folder


METHOD = ("pattern=2:4", "mitigation=shift+var", "dtype=float32")


@pytest.fixture
def own_run(nmsweep: Call, results: Path, yamls: Path) -> CellRecord:
    """The cell that nmsweep's own command line gives."""
    words = ("model=tiny-llama", "device=cpu", *METHOD, "tasks=own_science", "eval.limit=30", "baseline=false")
    code, _, err = nmsweep(*words, f"eval.include_path={yamls}", f"results_dir={results}")
    assert code == 0, err
    (folder,) = cell_folders(results)
    return read_cell(folder)


def test_simple_evaluate_gives_the_numbers_of_nmsweeps_own_run(own_run: CellRecord, yamls: Path) -> None:
    manager = lm_eval.tasks.TaskManager(include_path=str(yamls), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model="nmsweep", model_args=",".join(["pretrained=tiny-llama", *METHOD]), tasks=["own_science"],
        task_manager=manager, limit=30, bootstrap_iters=0, device="cpu",
    )  # fmt: skip
    for metric, value in own_run.metrics.set_index("metric")["value"].items():
        assert theirs["results"]["own_science"][f"{metric},none"] == value
    for mine, other in zip(own_run.samples["loglikelihoods"], theirs["samples"]["own_science"], strict=True):
        assert list(mine) == [value for value, _ in other["filtered_resps"]]


CALIBRATED = {
    "text": ("mitigation=shift_static", "pattern=2:4"),
    "greedy": ("policy=greedy", "pattern=2:4", "allocation.patterns=1:4+2:4+3:4"),
    "skip": ("scope=skip_first:50%", "pattern=2:4"),
}


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_and_allocated_cells_are_nmsweeps_own(
    method: str, nmsweep: Call, results: Path, yamls: Path, tmp_path: Path
) -> None:
    own = (*CALIBRATED[method], "dtype=float32", "calibration.source=mini", "calibration.seqlen=32")
    words = ("model=tiny-llama", "device=cpu", *own, "tasks=own_science", "eval.limit=12", "baseline=false")
    code, _, err = nmsweep(*words, f"eval.include_path={yamls}", f"results_dir={results}")
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    for tasks in ((), ("tasks=own_science", f"eval.include_path={yamls}")):
        theirs = lm_eval.simple_evaluate(
            model="nmsweep", tasks=["own_science"], limit=12, bootstrap_iters=0, device="cpu",
            model_args=",".join(["pretrained=tiny-llama", *own, *tasks, f"results_dir={tmp_path / str(len(tasks))}"]),
            task_manager=lm_eval.tasks.TaskManager(include_path=str(yamls), include_defaults=False),
        )  # fmt: skip
        for mine, other in zip(record.samples["loglikelihoods"], theirs["samples"]["own_science"], strict=True):
            assert list(mine) == [value for value, _ in other["filtered_resps"]]


def asked(model: NMSweepLM, how: str, doc: dict[str, str]) -> None:
    arguments = {
        "loglikelihood": ("A", " b"),
        "loglikelihood_rolling": ("A b",),
        "generate_until": ("A", {"until": []}),
    }
    getattr(model, how)([Instance(how, doc, arguments[how], 0, ("own", 0, 1))])  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["loglikelihood", "loglikelihood_rolling"])
def test_scope_decode_is_refused_where_given_text_is_scored(how: str) -> None:
    model = NMSweepLM("tiny-llama", device="cpu", pattern="2:4", scope="decode")
    with pytest.raises(InputError, match="decode is of generated text, but own only scores"):
        asked(model, how, {"text": "A b"})


@pytest.mark.parametrize("scope", ["all", "decode"])
def test_clact_is_refused_where_text_is_generated(scope: str) -> None:
    model = NMSweepLM("tiny-llama", device="cpu", pattern="2:4", criterion="clact", scope=scope)
    with pytest.raises(InputError, match="clact looks at later tokens, but own generates text"):
        asked(model, "generate_until", {"text": "A"})


def test_calibration_text_is_never_what_is_asked() -> None:
    words = {"pattern": "2:4", "mitigation": "shift_static", "calibration.seqlen": 32}
    with pytest.raises(InputError, match="auto goes by the tasks, which lm-eval does not tell"):
        NMSweepLM("tiny-llama", device="cpu", **words)
    model = NMSweepLM("tiny-llama", device="cpu", **words, **{"calibration.source": "mini"})
    asked(model, "loglikelihood", {"text": "nothing of it"})
    text = (MINI_FOLDER / "calibration.txt").read_text()
    with pytest.raises(InputError, match="mini_calibration has text in common with the evaluated task own"):
        asked(model, "loglikelihood", {"text": text[2000:2300]})


@pytest.mark.slow
def test_the_harnesss_command_line_gives_the_numbers_of_nmsweeps_own_run(
    own_run: CellRecord, yamls: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "nmsweep.lm_eval", "--model", "nmsweep", "--device", "cpu", "--tasks", "own_science",
        "--model_args", ",".join(["pretrained=tiny-llama", *METHOD]), "--include_path", str(yamls), "--limit", "30",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["own_science"]
    ours = own_run.metrics.set_index("metric")["value"]
    assert {name: theirs[f"{name},none"] for name in ours.index} == ours.to_dict()


def test_simple_evaluate_takes_it_by_name_and_the_model_is_dense_again(yamls: Path) -> None:
    manager = lm_eval.tasks.TaskManager(include_path=str(yamls), include_defaults=False)
    arguments = {"pretrained": "tiny-llama", "dtype": "float32", "pattern": "2:4"}
    values = [
        lm_eval.simple_evaluate(
            model="nmsweep", model_args={**arguments, **more}, tasks=["own_science"], task_manager=manager, limit=30,
            bootstrap_iters=0, device="cpu",
        )["samples"]["own_science"][0]["resps"]
        for more in ({}, {"scoring": "stock"}, {"pattern": "dense"})
    ]  # fmt: skip
    numbers = [[float(value) for ((value, _),) in value_of] for value_of in values]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)
    assert numbers[0] != pytest.approx(numbers[2], abs=1e-3)


def test_a_closed_model_is_dense() -> None:
    sparse = NMSweepLM("tiny-llama", device="cpu", pattern="2:4", dtype="float32")
    names = {type(module).__name__ for module in sparse.model.modules()}
    sparse._dense_again()
    assert "SparseLinear" in names
    assert "SparseLinear" not in {type(module).__name__ for module in sparse.model.modules()}


def test_mistakes_read_as_on_nmsweeps_own_command_line() -> None:
    with pytest.raises(InputError, match="criterion: 'akt' is not known"):
        NMSweepLM("tiny-llama", device="cpu", criterion="akt")
    with pytest.raises(InputError, match="pretrained: 'no-such' is no model"):
        model_words("no-such")
    with pytest.raises(InputError, match=r"eval\.scoring: 'stok' is not valid"):
        NMSweepLM("tiny-llama", device="cpu", scoring="stok")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"eval\.num_fewshot: has no effect here"):
        NMSweepLM("tiny-llama", device="cpu", **{"eval.num_fewshot": 5})
    assert model_words("owner/name") == ["model=llama", "model.repo=owner/name", "model.name=name"]
