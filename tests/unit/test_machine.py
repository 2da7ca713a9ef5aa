"""What workers take of a machine: no more cores, memory or GPUs than their process may use."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nmsweep.cell.session import place_of
from nmsweep.sweep import machine
from nmsweep.sweep.executors.slurm import SEEN_GPUS, see_gpus
from nmsweep.sweep.machine import available_bytes, n_processes, share_machine, shares_gpus

GIB = 1 << 30


def cgroups(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A /proc and a /sys with the files of cgroups."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "gib"),
    [
        ("0::/\n", {"memory.max": "max", "memory.current": "5"}, 64),
        ("0::/\n", {"memory.max": str(8 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 1\ninactive_file {GIB}"}, 6),
        ("0::/slurm/job1\n", {"slurm/job1/memory.max": "max", "slurm/memory.max": str(4 * GIB), "slurm/memory.current": "0"}, 4),
        ("0::/a/path/of/the/host\n", {"memory.max": str(2 * GIB)}, 2),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": str(8 * GIB), "memory/job/memory.usage_in_bytes": str(GIB), "memory/memory.limit_in_bytes": str(2**63 - 4096)}, 7),
        ("4:cpu,cpuacct:/job\n", {"memory/job/memory.limit_in_bytes": str(GIB)}, 64),
        ("0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB)}, 0),
        ("0::/\n", {"memory.max": str(128 * GIB)}, 64),
    ],
)  # fmt: skip
def test_memory_is_what_the_cgroup_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, files: dict[str, str], gib: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert available_bytes(cgroups(tmp_path, cgroup, files)) == gib * GIB


def plan_on(*devices: str) -> Any:
    """As much of a plan as decides about workers: one cell and model a device."""
    cells = [SimpleNamespace(model_key=device, config={"device": device}) for device in devices]
    return SimpleNamespace(cells=cells, config=lambda cell: SimpleNamespace(device=cell.config["device"]))


def test_workers_are_no_more_than_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "model_bytes", lambda cfg: GIB)
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: 3)
    for free, n_workers in ((0, 1), (7 * GIB, 2), (64 * GIB, 3)):
        monkeypatch.setattr(machine, "available_bytes", lambda free=free: free)
        assert n_processes(plan_on("cpu"), [0]) == n_workers


@pytest.mark.parametrize(
    ("devices", "n_workers"),
    [(("cuda",), 4), (("cuda", "cpu"), 4), (("cuda:1",), 1), (("cuda:0", "cuda"), 1), (("mps",), 1)],
)
def test_a_gpu_that_is_named_by_its_number_has_one_worker(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], n_workers: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert n_processes(plan_on(*devices), range(len(devices))) == n_workers


@pytest.mark.parametrize(("device", "given"), [("cuda", [0, 1, 0, 1]), ("cuda:1", [None] * 4), ("cpu", [None] * 4)])
def test_workers_share_the_gpus_by_number_unless_the_plan_names_one(
    monkeypatch: pytest.MonkeyPatch, device: str, given: list[int | None]
) -> None:
    """Numbers are of what CUDA_VISIBLE_DEVICES lets the command see, which stays as the user has it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43,MIG-1a")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    got: list[int | None] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: got.__setitem__(-1, number))
    for worker in range(4):
        got.append(None)
        share_machine(worker, 4, with_gpus=shares_gpus(plan_on(device)))
    assert got == given
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5ebe9f43,MIG-1a"


@pytest.mark.parametrize(("device", "place"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_model_goes_to_the_gpu_that_its_process_was_given(
    monkeypatch: pytest.MonkeyPatch, device: str, place: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert place_of(SimpleNamespace(device=device)) == place  # type: ignore[arg-type]


@pytest.mark.parametrize("seen", ["2,3", "all", None])
def test_jobs_see_the_gpus_of_the_command_that_started_them(monkeypatch: pytest.MonkeyPatch, seen: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit leaves it
    if seen is not None:
        monkeypatch.setenv(SEEN_GPUS, seen)
    see_gpus()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == {"all": None, None: ""}.get(seen, seen)
    assert SEEN_GPUS not in os.environ
