import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from nmsweep.errors import InputError, StorageError
from nmsweep.results.leftovers import leftovers, remove_abandoned, restore
from nmsweep.results.record import (
    LAYER_COLUMNS,
    METRIC_COLUMNS,
    LayerCount,
    Metric,
    Part,
    Parts,
    cell_folder,
    clear_failure,
    failure_folder,
    find_cell,
    read_cell,
    write_cell,
    write_failure,
)  # fmt: skip
from nmsweep.results.storage import put_back, whole_folder, write_text

METRICS = [Metric("boolq", "acc", 0.5, 0.1, 4), Metric("wikitext2", "perplexity", 12.25, None, 3)]
LAYERS = [LayerCount("model.layers.0.q", 8, 4, 100, 50, 0.25)]
SAMPLES = pd.DataFrame({"task": ["boolq"], "item": [0], "loglikelihoods": [[-1.5, -2.25]]})


def write(folder: Path) -> None:
    shared = {
        "cell_id": "abc",
        "model": "none",
        "criterion": "none",
        "pattern": "2:4",
        "n": 2,
        "m": 4,
        "status": "done",
    }
    write_cell(folder, {"pattern": "2:4"}, shared, METRICS, LAYERS, SAMPLES, {"cell_id": "abc", "status": "done"})


def test_a_cell_reads_what_was_written(tmp_path: Path) -> None:
    folder = cell_folder(tmp_path, "m", "2-4", "act", "shift+var", "abc")
    write(folder)
    record = read_cell(folder)
    assert folder.name == "m_2-4_act_shift+var_abc"
    assert list(record.metrics.columns) == list(METRIC_COLUMNS)
    assert list(record.layers.columns) == list(LAYER_COLUMNS)
    assert record.metrics["value"].tolist() == [0.5, 12.25]
    assert record.metrics["model"].tolist() == ["none", "none"], "the word none is a word, not a missing value"
    assert pd.isna(record.metrics["stderr"].iloc[1])
    assert record.layers["sparsity"].tolist() == [0.5]
    assert list(record.samples["loglikelihoods"].iloc[0]) == [-1.5, -2.25]
    assert record.cell_id == "abc"
    assert find_cell(tmp_path, "abc") == folder
    assert find_cell(tmp_path, "abd") is None


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        with whole_folder(place) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "cells" / "one")
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_cell_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "one") as place:
            (place / text).write_text(text)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tidy.csv"
    write_text(file, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["tidy.csv"]


def test_what_is_replaced_survives_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    """The child is killed when the old folder has gone aside and the new one has not come."""
    place = tmp_path / "cells" / "one"
    code = f"""
import os
from pathlib import Path
from nmsweep.results import storage
place, rename = Path({str(place)!r}), os.rename
def killed(source, target):
    if Path(target) == place and place.parent.glob(".old_*"):
        os._exit(9)
    rename(source, target)
for text in ("old", "new"):
    if text == "new":
        storage.os.rename = killed
    with storage.whole_folder(place) as folder:
        (folder / text).write_text(text)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not place.exists()
    assert {leftover.path.name[:5] for leftover in leftovers(tmp_path)} == {".old_", ".tmp_"}
    restore(tmp_path)
    assert [file.name for file in place.iterdir()] == ["old"]
    assert remove_abandoned(tmp_path) == 1
    assert [folder.name for folder in place.parent.iterdir()] == ["one"]


def test_what_was_replaced_meanwhile_is_not_put_back(tmp_path: Path) -> None:
    aside = tmp_path / ".old_x"
    for folder, text in ((aside / "one", "old"), (tmp_path / "one", "new")):
        folder.mkdir(parents=True)
        (folder / text).touch()
    put_back(aside)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["new"]
    assert not aside.exists()


def test_a_write_that_cannot_take_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = tmp_path / "one", os.rename
    with whole_folder(place) as folder:
        (folder / "old").touch()

    def full(source: Path, target: Path) -> None:
        if target == place and source.name.startswith(".tmp_"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StorageError), whole_folder(place) as folder:
        (folder / "new").touch()
    assert [file.name for file in place.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *places: (steps.append("replace"), replace(*places)))
    write_text(tmp_path / "plan.json", "{}")
    assert steps == ["fsync", "replace"]


@pytest.mark.parametrize("file", ["config.yaml", "metrics.csv", "layers.csv", "samples.parquet", "provenance.json"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_damaged_record_is_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "cells" / "m_abc"
    write(folder)
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(b'{"a: \xff')
    with pytest.raises(InputError, match="m_abc"):
        read_cell(folder)


def test_a_part_is_reused_only_for_the_same_data(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "p")
    part = Part("boolq", {"version": "2", "data": "f"}, METRICS[:1], LAYERS, SAMPLES, {"time_s": 1.0})
    assert parts.read("boolq", part.identity) is None
    parts.write(part)
    again = parts.read("boolq", part.identity)
    assert again is not None
    assert (again.metrics, again.layers, again.provenance) == (METRICS[:1], LAYERS, {"time_s": 1.0})
    assert parts.read("boolq", {"version": "2", "data": "g"}) is None
    parts.forget()
    assert parts.read("boolq", part.identity) is None


def test_a_failure_is_recorded_apart_and_goes_with_success(tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "m_abc"
    place = failure_folder(tmp_path, folder.name)
    write_failure(place, {"pattern": "2:4"}, {"error": "boom"})
    assert json.loads((place / "provenance.json").read_text())["status"] == "failed"
    assert place.parent == tmp_path / "failed"
    assert not folder.exists()
    clear_failure(folder)
    assert not place.exists()
