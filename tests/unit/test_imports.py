"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import nmsweep

ROOT = Path(nmsweep.__file__).parent
ORDER = [
    "errors",
    "progress",
    "config",
    "kernels",
    "methods",
    "models",
    "results",
    "statistics",
    "sparsity",
    "data",
    "calibration",
    "testing",
    "evaluate",
    "cell",
    "sweep",
    "report",
    "lm_eval",
    "bench",
    "commands",
    "cli",
]
"""Parts of the package from the bottom up: each imports only parts to its left."""

REPORT_MAY = {"errors", "config", "results", "statistics", "report"}


def imported(file: Path) -> set[str]:
    """The parts of nmsweep that a file imports at its top level or inside functions."""
    return {module.split(".")[1] for module in imported_modules(file)}


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names |= {module for module in modules if module.startswith("nmsweep.")}
    return names


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_go_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted(ROOT.rglob("*.py"))
        if (part := part_of(file)) not in ("__init__", "__main__")
        for name in sorted(imported(file))
        if ORDER.index(name) > ORDER.index(part)
    ]
    assert not wrong


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {part_of(file) for file in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert parts == set(ORDER)


def test_report_needs_records_and_statistics_only() -> None:
    assert {part for file in (ROOT / "report").rglob("*.py") for part in imported(file)} <= REPORT_MAY


def test_a_report_needs_no_torch() -> None:
    code = "import sys, nmsweep.commands.report, nmsweep.statistics, nmsweep.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_status_and_executors_need_no_torch() -> None:
    code = "import sys, nmsweep.commands.status, nmsweep.commands.run, nmsweep.sweep.executors.slurm, nmsweep.sweep.executors.local; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_command_line_starts_without_anything_heavy() -> None:
    code = "import sys, nmsweep.cli, nmsweep.commands.run; print([m for m in ('torch', 'transformers', 'pandas', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_workers_import_before_they_part_asks_for_no_gpu() -> None:
    code = """
import importlib, torch
from nmsweep.sweep.executors.local import IMPORTED

def asked(*args, **kwargs):
    raise SystemExit("CUDA, which does not outlive a fork, was asked for")

for module, names in ((torch.cuda, "is_available device_count init _lazy_init current_device"), (torch._C, "_cuda_getDeviceCount"),
                      (torch.accelerator, "is_available device_count")):
    for name in names.split():
        if hasattr(module, name):  # torch._C of a build without CUDA lacks it, and others look whether it is there
            setattr(module, name, asked)
for name in IMPORTED:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
