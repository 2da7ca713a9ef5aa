"""What hostile files try, and that nothing comes of it: docs/security.md."""

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nmsweep.cell.session import Session
from nmsweep.config.schema import short_hash
from nmsweep.data.tasks import LONGEST_LINE_BYTES, find_task
from nmsweep.errors import DataError, InputError
from nmsweep.results.owner import Owner
from nmsweep.sweep.plan import load, plan_ids
from nmsweep.sweep.work import attempt

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float32", "eval.limit=4", "tasks=mini_science", "baseline=false")


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def forged(results: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A plan that says something else, under the name that its content has."""
    (plan_id,) = plan_ids(results)
    file = results / ".plans" / f"{plan_id}.json"
    content = json.loads(file.read_text())
    content["common"] = {key: value for key, value in content["common"].items() if key != "cells"}
    change(content)
    file.unlink()
    new = short_hash(content, 20)
    (file.parent / f"{new}.json").write_text(json.dumps(content))
    return new


def merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    """Set keys of a config, those of nodes one by one."""
    for key, value in change.items():
        whole = key == "criterion" or not isinstance(value, dict)
        into[key] = value if whole else {**into[key], **value}


def wheel_of(requirement: str) -> dict[str, Any]:
    return {"source": "wheel", "gguf_sha256": "0" * 64, "wheels": [{"requirement": requirement, "sha256": "0" * 64}]}


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", ".hidden", "a/b", ""])
def test_names_in_a_plan_do_not_become_paths(nmsweep: Call, results: Path, name: str) -> None:
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    new = forged(results, lambda content: content["cells"][0].update(name=name))
    with pytest.raises(InputError, match="is no cell's name"):
        load(results, new)


def error_of_forged(results: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """The error of running the only cell of a forged plan."""
    plan = load(results, forged(results, change))
    (cell,) = plan.cells
    shutil.rmtree(results / "cells" / cell.name, ignore_errors=True)
    try:
        return attempt(cell, plan.config(cell), Session()).error
    except InputError as error:
        return str(error)


def criterion(target: str, **params: Any) -> dict[str, Any]:
    return {"criterion": {"name": "x", "target": target, "params": params}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (criterion("os.system"), "allowed: nmsweep and what"),
        (criterion("nmsweep.__main__.main"), "name the class"),
        (criterion("nmsweep.cell.run.run"), "neither a Criterion nor a Mitigation"),
        ({"model": {"name": "../outside"}}, "has no usable name"),
        ({"tasks": ["../outside"]}, "'../outside' is no task name"),
        ({"model": wheel_of("-r/tmp/options==1")}, "NAME==VERSION"),
        ({"model": wheel_of("evil @ file:///tmp/evil-1.tar.gz#==1")}, "NAME==VERSION"),
    ],
)
def test_a_plan_names_no_foreign_code_and_no_place(
    nmsweep: Call, results: Path, change: dict[str, Any], why: str
) -> None:
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    assert why in error_of_forged(results, lambda content: merge(content["common"], change))


def test_what_a_plan_names_is_not_called_before_it_is_known_to_be_a_method(
    nmsweep: Call, results: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    target = "nmsweep.results.storage.write_text"
    forge = criterion(target, place=str(trace), text="x")
    error = error_of_forged(results, lambda content: merge(content["common"], forge))
    assert "neither a Criterion nor a Mitigation" in error
    assert not list(tmp_path.glob("trace*"))


@pytest.mark.parametrize(
    "word",
    [
        "plugins=[os]",
        "eval.include_path=.",
        "model.trust_remote_code=true",
        "++model.trust_remote_code=true",
        "eval={include_path: .}",
        "loggers.mlflow.tracking_uri=http://evil",
        "loggers.wandb.entity=evil",
        "--config-dir=.",
        "-cd=.",
        "hydra.searchpath=[file://.]",
        "hydra/launcher=mine",
        "+hydra.launcher.setup=[touch trace]",
        "hydra.launcher._target_=os.system",
        "hydra.launcher.setup=[touch trace]",
        "hydra.launcher.submitit_folder=of-others/%j",
        "hydra.launcher.partition='gpu\\ntouch trace'",
        "hydra.launcher.cpus_per_task=$(touch trace)",
        "hydra.launcher.ray.init.address=evil:1",
    ],
)
def test_retry_refuses_a_plan_whose_words_may_run_other_code(nmsweep: Call, results: Path, word: str) -> None:
    assert nmsweep("-m", *TINY, "pattern=2:4", "hydra/launcher=basic", f"results_dir={results}")[0] == 0
    assert nmsweep("retry", f"results_dir={results}")[0] == 0
    forged(results, lambda content: content["words"].append(word))
    shutil.rmtree(results / "cells")
    code, _, err = nmsweep("retry", f"results_dir={results}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{word} may run code from outside nmsweep" in err
    assert "give its command: nmsweep -m model=tiny-llama" in err
    assert not (results / "cells").exists()


def test_retry_takes_the_resources_that_a_plan_asks_for(nmsweep: Call, results: Path) -> None:
    assert nmsweep("-m", *TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    words = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=7", "hydra.launcher.name=mine"]
    forged(results, lambda content: content["words"].extend(words))
    code, _, err = nmsweep("retry", f"results_dir={results}")
    assert code == 0, err
    assert "nothing to do" in err


@pytest.mark.parametrize("inside", ["quarantine", ".runs", "cells", ".parts", ".parts/x", ".claims", ".calibration"])
def test_gc_removes_nothing_behind_a_link(nmsweep: Call, results: Path, tmp_path: Path, inside: str) -> None:
    outside = tmp_path / "outside"
    gone = f"{Owner('vm', '0' * 8, 1, 1)}_abcdef01"
    for name in ("thesis.1", f".tmp_{gone}", f".old_{gone}"):
        (outside / name).mkdir(parents=True) if inside != ".claims" else outside.mkdir(exist_ok=True)
        place = outside / name / "text" if inside != ".claims" else outside / name
        place.write_text("mine")
        for path in (place, outside / name):
            os.utime(path, (0, 0))
    link = results / inside
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    link_to_one = results / f".tmp_{gone}"
    link_to_one.symlink_to(outside)
    os.utime(link_to_one, (0, 0), follow_symlinks=False)
    code, out, _ = nmsweep("gc", "remove", f"results_dir={results}")
    assert code == 0
    assert "1 removed" in out
    assert not link_to_one.is_symlink()
    assert len(list(outside.iterdir())) == 3


@pytest.mark.parametrize("word", ["tasks=../../etc/passwd", "model.name=../x", "tasks=[a/b]"])
def test_names_on_the_command_line_do_not_become_paths(nmsweep: Call, results: Path, word: str) -> None:
    code, _, err = nmsweep(*TINY, word, f"results_dir={results}")
    assert code == 2, err
    assert not results.exists()


def test_a_pickled_record_or_checkpoint_is_never_loaded(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = nmsweep(*TINY, f"model.path={folder}", f"results_dir={results}")
    assert code == 2, err
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    (cell,) = (results / "cells").iterdir()
    for name in ("samples.parquet", "provenance.json"):
        (cell / name).write_bytes(pickle.dumps(Bomb(trace)))
    code, _, err = nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")
    assert code == 0
    assert "is damaged" in err
    assert not trace.exists()


def test_a_checkpoints_own_code_does_not_run_unasked(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "checkpoint"
    folder.mkdir()
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    (folder / "model.safetensors").write_bytes(b"")
    code, _, err = nmsweep(*TINY, f"model.path={folder}", f"results_dir={results}")
    assert code == 2, err
    assert not trace.exists()


QUESTIONS: list[dict[str, Any]] = [
    {"question": f"is it {n}", "passage": "it is.", "label": n % 2, "idx": n} for n in range(6)
]


def lines(change: dict[str, Any] = {}) -> bytes:  # noqa: B006 - it is only read
    return "".join(json.dumps({**item, **change}) + "\n" for item in QUESTIONS).encode()


def mirror_with(folder: Path, content: bytes, task: str = "boolq", name: str = "validation.jsonl") -> Path:
    (folder / task).mkdir(parents=True)
    (folder / task / name).write_bytes(content)
    return folder


MALFORMED = {
    "cut off": (b'{"question": "a", ', "is no JSON in line 1"),
    "not text": (b"\x00\xff\xfe\x93PAR1" * 50, "is no JSON in line 1"),
    "latin 1": ('{"question": "\xe9"}'.encode("latin-1"), "is no JSON in line 1"),
    "compressed": (gzip.compress(lines()), "is no JSON in line 1"),
    "pickled": (pickle.dumps(QUESTIONS), "is no JSON in line 1"),
    "empty": (b"\n", "has no item"),
    "lists": (lines() + b"[1, 2]\n", "has no object in line 7"),
    "deep": (lines() + b'{"question":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deep in line 7"),
    "gigantic": (lines() + b'{"question": "' + b"x" * LONGEST_LINE_BYTES + b'"}', "has more than 16 MiB in line 7"),
}
"""Of these the nested one ends the whole process in Arrow's parser, were it read there."""


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_mirror_file_is_one_error_before_anything_runs(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED[case]
    with pytest.raises(DataError, match=message):
        find_task("boolq", mirror_with(tmp_path / "mirror", content))


def test_a_malformed_mirror_file_leaves_no_results(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    mirror = mirror_with(tmp_path / "mirror", MALFORMED["deep"][0])
    code, _, err = nmsweep(*TINY, "tasks=boolq", f"data.mirror={mirror}", f"results_dir={results}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "nested too deep" in err
    assert not results.exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a": 1}\n', "'passage' is undefined"),
        (lines({"label": "zero"}), "'zero' is none of its 2 choices"),
        (lines({"label": 99}), "IndexError"),
    ],
)
def test_items_of_another_form_fail_their_cell_with_one_line(
    nmsweep: Call, results: Path, tmp_path: Path, content: bytes, why: str
) -> None:
    mirror = mirror_with(tmp_path / "mirror", content)
    code, _, err = nmsweep(*TINY, "tasks=boolq", f"data.mirror={mirror}", f"results_dir={results}")
    assert code == 1
    (line,) = [line for line in err.splitlines() if "FAILED" in line]
    assert "are not of the task's form" in line
    assert why in line
    assert not list((results / "cells").glob("*"))


def test_an_item_is_text_and_no_template(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    mirror = mirror_with(tmp_path / "mirror", lines({"passage": "{{ 7 * 6 }}{% for x in y %}"}))
    code, _, err = nmsweep(*TINY, "tasks=boolq", f"data.mirror={mirror}", f"results_dir={results}")
    assert code == 0, err
    (items,) = (results / "items").glob("boolq_*.parquet")
    assert all("{{ 7 * 6 }}{% for x in y %}" in text for text in pd.read_parquet(items)["text"])


def test_a_text_that_is_no_text_fails_its_cell(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    mirror = mirror_with(tmp_path / "mirror", b"\xff\xfe\x00" * 50, "wikitext2", "test.txt")
    code, _, err = nmsweep(*TINY, "tasks=wikitext2", f"data.mirror={mirror}", f"results_dir={results}")
    assert code == 1
    assert "test.txt is no UTF-8" in err
