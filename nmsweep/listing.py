"""`nmsweep list`: every model, pattern, criterion, mitigation and task preset, with its source."""

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from nmsweep.catalogue import Option, conf_dir, options
from nmsweep.config import TARGET_PRESETS

_PATTERNS = (
    ("dense", "no change", ""),
    ("N:M", "N kept of each M consecutive channels of a token, any 0 < N <= M", "arXiv:2509.22166"),
    ("p%", "share of a token's channels set to zero, unstructured", "arXiv:2509.22166"),
)


def source_of(option: Option) -> str:
    """What the docstring of an option's class names as its source."""
    target = str(option.node.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if not module:
        return str(option.node.get("license", ""))
    doc = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    found = re.search(r"^Source: (.+?)(?:\n\s*\n|\n\w+:|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def show_list(config_dir: Path | None, console: Console | None = None) -> None:
    """Print what can be chosen."""
    out = console or Console()
    for title, group in (
        ("model", "model"),
        ("criterion", "criterion"),
        ("mitigation", "mitigations"),
        ("experiment", "experiment"),
    ):
        found = options(group, config_dir)
        if found:
            out.print(_table(title, [(name, option.summary, source_of(option)) for name, option in found.items()]))
    out.print(_table("pattern", list(_PATTERNS)))
    out.print(_table("targets", [(name, "", "") for name in TARGET_PRESETS]))
    presets: Mapping[str, list[str]] = yaml.safe_load((conf_dir() / "config.yaml").read_text())["task_presets"]
    out.print(_table("tasks", [(name, " + ".join(tasks), "") for name, tasks in presets.items()]))


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, title_style="bold")
    for column in ("name", "what", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
