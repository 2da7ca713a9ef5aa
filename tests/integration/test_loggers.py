"""Loggers run after a cell is finished and cannot fail it."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nmsweep.cell import loggers
from nmsweep.results.record import cell_folders, read_cell
from nmsweep.sweep.plan import plan_ids

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float32", "eval.limit=4", "tasks=mini_science", "loggers.mlflow.enabled=true")


@pytest.mark.filterwarnings("ignore")  # its own libraries warn of each other
def test_mlflow_has_one_run_per_cell_grouped_by_sweep(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ("-m", *TINY, "pattern=2:4,8:16", f"loggers.mlflow.tracking_uri={uri}", f"results_dir={results}")
    code, _, err = nmsweep(*words)
    assert code == 0, err
    assert "was not told" not in err
    client = tracking.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("nmsweep").experiment_id])
    assert {run.info.run_name for run in runs} == {folder.name for folder in cell_folders(results)}
    assert {run.data.tags["sweep"] for run in runs} == set(plan_ids(results))
    for run in runs:
        record = read_cell(results / "cells" / run.info.run_name)
        expected = {f"{row.task}/{row.metric}": row.value for row in record.metrics.itertuples()}
        assert expected.items() <= run.data.metrics.items()
    assert nmsweep(*words)[0] == 0  # nothing is computed or logged again
    assert len(client.search_runs([runs[0].info.experiment_id])) == 3


def wandb_records(file: Path) -> Iterator[Any]:
    """Return the records of a W&B offline run: protobuf messages in a LevelDB log, here of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = file.read_bytes(), 7  # after ":W&B", a magic number and the format's version
    assert content[:4] == b":W&B"
    assert len(content) < 2**15
    while at < len(content):
        _, length, _ = struct.unpack_from("<IHB", content, at)  # checksum, length, whether it is whole
        yield Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length


@pytest.mark.filterwarnings("ignore")  # its own libraries warn of each other
def test_wandb_offline_has_one_run_per_cell_grouped_by_sweep(
    nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ("-m", *TINY[:-1], "baseline=false", "pattern=2:4,8:16", "loggers.wandb.enabled=true")
    code, _, err = nmsweep(*words, f"results_dir={results}")
    assert code == 0, err
    assert "was not told" not in err
    runs: dict[str, dict[str, float]] = {}
    for file in (results / ".runs" / "wandb").glob("offline-run-*/*.wandb"):
        records = list(wandb_records(file))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.run_group == plan_ids(results)[0]
        history = [item for record in records if record.WhichOneof("record_type") == "history" for item in record.history.item]  # fmt: skip
        runs[run.display_name] = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history}  # fmt: skip
    assert set(runs) == {folder.name for folder in cell_folders(results)}
    for name, told in runs.items():
        expected = {f"{row.task}/{row.metric}": row.value for row in read_cell(results / "cells" / name).metrics.itertuples()}  # fmt: skip
        assert expected.items() <= told.items()


@pytest.mark.parametrize("harm", ["raises", "exits", "hangs"])
def test_a_logger_cannot_fail_a_cell(nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    import time

    def send(*args: object) -> None:
        if harm == "raises":
            raise ConnectionError("no route to host")
        if harm == "exits":
            raise SystemExit(3)
        time.sleep(2)

    monkeypatch.setitem(loggers.LOGGERS, "mlflow", send)
    monkeypatch.setattr(loggers, "TIMEOUT_S", 0.2)
    code, _, err = nmsweep(*TINY, "pattern=2:4", "baseline=false", f"results_dir={results}")
    assert code == 0
    assert "mlflow was not told" in err
    assert len(cell_folders(results)) == 1


def test_no_logger_runs_by_default(nmsweep: Call, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    for name in loggers.LOGGERS:
        monkeypatch.setitem(loggers.LOGGERS, name, lambda *args: told.append(args))
    assert nmsweep(*TINY[:-1], "pattern=2:4", "baseline=false", f"results_dir={results}")[0] == 0
    assert not told
