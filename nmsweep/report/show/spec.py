"""The form of a table: its rows, columns and quantity, its entries, and the presets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import pandas as pd

from nmsweep.config.pattern import parse_pattern
from nmsweep.errors import InputError, nearest
from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.results.read import FIELDS

DIMENSIONS = (*FIELDS, "tasks", "variant", "task")
"""Fields for rows and columns; `tasks` is the set of tasks that a mean is over, `task` one of them."""

Status = Literal["done", "failed", "missing"]


@dataclass(frozen=True)
class Entry:
    """One number of a table, in the quantity's own unit.

    Attributes:
        status: ``missing`` where no cell was run.
        best: whether it is the best of its column, among the rows with the same front fields.
        tied: whether it is not significantly worse than the best: the 95 % interval of their paired difference contains 0.
        cells: ids of the cells behind it, one for each seed.
    """

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    status: Status = "missing"
    best: bool = False
    tied: bool = False
    cells: tuple[str, ...] = ()


MISSING = Entry()


@dataclass(frozen=True)
class TableSpec:
    """The form of a table.

    Attributes:
        name: the name of its files.
        title: the start of its caption.
        rows, cols: fields of `DIMENSIONS`.
        metric: a key of `QUANTITIES`.
        where: allowed values by field; a dense cell is always allowed.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    cols: tuple[str, ...]
    metric: str = "drop"
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_PLAIN = {"mitigation": ("none",)}
_ACTIVATIONS = {"operand": ("activations",)}

PRESETS = (
    TableSpec("pattern_model", "Patterns and models", ("pattern",), ("model",), where=_PLAIN),
    TableSpec("criterion_pattern", "Criteria and patterns", ("criterion",), ("pattern",), where=_PLAIN | _ACTIVATIONS),
    TableSpec("mitigation_pattern", "Mitigations and patterns", ("mitigation",), ("pattern",), where=_ACTIVATIONS),
    TableSpec("operand_pattern", "Activation against weight pruning", ("operand", "criterion"), ("pattern",), where=_PLAIN),
    TableSpec("targets_pattern", "Sensitivity by target layers", ("targets",), ("pattern",), where=_PLAIN),
    TableSpec("pattern_task", "Patterns and tasks", ("pattern",), ("task",), where=_PLAIN),
)  # fmt: skip
"""The tables of every report. Fields that vary and are neither rows nor columns are put in front of the rows."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table with its entries.

    Attributes:
        data: ``mini`` or ``real``; never both in one table.
        front: fields put in front of the rows, because they vary.
        constants: field and value that all sparse entries share, for the caption.
        frame: `Entry` objects; index levels are `front` and the rows, column levels the cols.
    """

    spec: TableSpec
    quantity: Quantity
    data: str
    front: tuple[str, ...]
    constants: Mapping[str, str]
    frame: pd.DataFrame

    @property
    def name(self) -> str:
        return f"{self.spec.name}_{self.quantity.name}"


def parse_spec(rows: str, cols: str, metric: str) -> TableSpec:
    """Parse the table of a command line, with fields joined by ``+``.

    Raises:
        InputError: a field or quantity that does not exist, or a field in both; all mistakes together.
    """
    errors = []
    fields = {"rows": _split(rows), "cols": _split(cols)}
    for side, words in fields.items():
        errors += [f"report.{side}: {word!r} is no field; {nearest(word, DIMENSIONS)}" for word in words if word not in DIMENSIONS]  # fmt: skip
        if not words:
            errors.append(f"report.{side}: nothing is named; allowed: {', '.join(DIMENSIONS)}, joined by +")
    errors += [f"report.cols: {word!r} is in report.rows too; name it once" for word in fields["cols"] if word in fields["rows"]]  # fmt: skip
    if metric not in QUANTITIES:
        errors.append(f"report.metric: {metric!r} is not known; {nearest(metric, QUANTITIES)}")
    if errors:
        raise InputError(*errors)
    title = f"{', '.join(fields['rows'])} and {', '.join(fields['cols'])}"
    return TableSpec("custom", title[0].upper() + title[1:], fields["rows"], fields["cols"], metric)


def _split(words: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in words.split("+") if word.strip()))


@cache
def order(name: str, value: object) -> tuple[float, float, str]:
    """Return a sort key: dense and none first, patterns by sparsity, mitigations by number of stages."""
    text = str(value)
    if name == "pattern":
        pattern = parse_pattern(text)
        return (-1.0, 0.0, text) if pattern.is_dense else (pattern.sparsity, -pattern.m, text)
    if name == "mitigation" and text != "none":
        return (1.0 + text.count("+"), 0.0, text)
    return (0.0 if text == "none" else 1.0, 0.0, text)


def in_order(cells: pd.DataFrame) -> pd.DataFrame:
    """Sort cells by model, pattern, criterion and mitigation, as `order` has it."""
    names = ("model", "pattern", "criterion", "mitigation")
    keys = [tuple(map(order, names, key)) for key in cells[list(names)].itertuples(index=False, name=None)]
    return cells.iloc[sorted(range(len(cells)), key=keys.__getitem__)]


@cache
def kind_of(pattern: str) -> str:
    """Return ``dense``, ``n:m``, ``unstructured``, ``threshold``, or ``policy`` where each layer has its own pattern."""
    parsed = parse_pattern(pattern)
    return "policy" if parsed.policy else parsed.kind


@cache
def metadata_bits_of(pattern: str) -> float:
    """Return the theoretical bits of metadata per element; NaN unless all layers have one N:M pattern."""
    bits = parse_pattern(pattern).metadata_bits
    return float("nan") if bits is None or kind_of(pattern) != "n:m" else bits
