"""What hostile files try, and that nothing comes of it: docs/security.md."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmsweep.config import short_hash
from nmsweep.errors import InputError
from nmsweep.sweep.launching import Batch
from nmsweep.sweep.plan import load, plan_ids

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


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", ".hidden", "a/b", ""])
def test_names_in_a_plan_do_not_become_paths(nmsweep: Call, results: Path, name: str) -> None:
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    new = forged(results, lambda content: content["cells"][0].update(name=name))
    with pytest.raises(InputError, match="is no cell's name"):
        load(results, new)


@pytest.mark.parametrize(
    ("key", "value"), [("criterion", {"name": "x", "target": "os.system", "params": {}}), ("plugins", ["os"])]
)
def test_a_plan_cannot_name_foreign_code(nmsweep: Call, results: Path, key: str, value: Any) -> None:
    assert nmsweep(*TINY, "pattern=2:4", f"results_dir={results}")[0] == 0
    new = forged(results, lambda content: content["common"].update({key: value}))
    plan = load(results, new)
    failed = results / "failed" / plan.cells[0].name
    failed.parent.mkdir(exist_ok=True)
    (results / "cells" / plan.cells[0].name).rename(failed)
    provenance = json.loads((failed / "provenance.json").read_text())
    (failed / "provenance.json").write_text(json.dumps({**provenance, "error": "boom"}))
    code, _, err = nmsweep("retry", f"results_dir={results}")
    assert code in (1, 2)
    assert "os" in err
    assert "allowed: nmsweep and what" in err or "add trust=true" in err


@pytest.mark.parametrize("word", ["x", "../../a:b:0:0:1", "0" * 20 + ":" + "0" * 12 + ":0;1:0:1"])
def test_a_batch_word_is_nothing_else(word: str) -> None:
    with pytest.raises(InputError, match="batch"):
        Batch.parse(word)


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
