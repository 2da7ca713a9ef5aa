"""`nmsweep list [config_dir=DIR]`: every model, pattern, criterion, mitigation and task preset, with its source."""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from nmsweep.commands.words import key_values
from nmsweep.config.catalogue import Option, options
from nmsweep.config.defaults import conf_dir
from nmsweep.config.schema import TARGET_PRESETS

_PATTERNS = (
    ("dense", "no change", ""),
    ("N:M", "N kept of each M consecutive channels of a token, any 0 < N <= M", "arXiv:2509.22166"),
    ("p%", "share of a token's channels set to zero, unstructured", "arXiv:2509.22166"),
    ("threshold:p%", "one static threshold a layer, calibrated for a mean share", "arXiv:2408.14690 (TEAL)"),
    ("greedy:N:M", "each layer a pattern of its own, N:M on average (policy=greedy)", "ours"),
)
_TARGETS = {
    "all": ("q, k, v, o, gate, up, down of every block", ""),
    "mlp": ("gate, up, down", ""),
    "attn": ("q, k, v, o", ""),
    "paper": ("all; of Qwen2 o, gate, up, down", "arXiv:2509.22166"),
    "amber": ("q, gate, down; sensitive layers by !glob, see `nmsweep sensitivity`", "arXiv:2508.02128"),
}
_SCOPES = (
    ("all", "every token", ""),
    ("prefill", "the prompt's", "arXiv:2508.02128"),
    ("decode", "those that are generated", ""),
    ("skip_first:K", "all after the first K", ""),
    ("skip_first:p%", "all after the first p % of the sequence", "arXiv:2408.14690, arXiv:2504.19449"),
)


def main(words: Sequence[str]) -> int:
    """Show what can be chosen."""
    values = key_values(words, ["config_dir"])
    show_list(Path(values["config_dir"]) if "config_dir" in values else None)
    return 0


def source_of(option: Option) -> str:
    """Return the source that the docstring of an option's class names."""
    target = str(option.node.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if not module:
        return str(option.node.get("license", ""))
    return doc_section(getattr(importlib.import_module(module), name), "Source")


def doc_section(documented: type, word: str) -> str:
    """Return the text after ``Source:``, ``Differs:``, … in a docstring, on one line; empty where there is none."""
    doc = inspect.getdoc(documented) or ""
    match = re.search(rf"^{word}: (.+?)(?:\n\s*\n|\n\w+:|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def prunes_weights(option: Option) -> bool:
    """Return whether a criterion prunes weights instead of activations."""
    module, _, name = str(option.node["_target_"]).rpartition(".")
    return bool(getattr(importlib.import_module(module), name).operand == "weights")


def show_list(config_dir: Path | None, console: Console | None = None) -> None:
    """Print what can be chosen."""
    out = console or Console()
    criteria = options("criterion", config_dir)
    weights = {name: option for name, option in criteria.items() if prunes_weights(option)}
    for title, choices in (
        ("model", options("model", config_dir)),
        ("criterion", {name: option for name, option in criteria.items() if name not in weights}),
        ("criterion, of weights instead of activations", weights),
        ("mitigation", options("mitigations", config_dir)),
        ("experiment", options("experiment", config_dir)),
    ):
        if choices:
            out.print(_table(title, [(name, option.summary, source_of(option)) for name, option in choices.items()]))
    out.print(_table("pattern", list(_PATTERNS)))
    out.print(_table("targets", [(name, *_TARGETS[name]) for name in TARGET_PRESETS]))
    out.print(_table("scope", list(_SCOPES)))
    presets: Mapping[str, list[str]] = yaml.safe_load((conf_dir() / "config.yaml").read_text())["task_presets"]
    out.print(_table("tasks", [(name, " + ".join(tasks), "") for name, tasks in presets.items()]))


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, title_style="bold")
    for column in ("name", "what", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
