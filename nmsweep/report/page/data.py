"""The data of the page's script: columns of numbers, and each word once."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from nmsweep.report.numbers.quantities import QUANTITIES
from nmsweep.report.numbers.scores import Scores, by_cell
from nmsweep.report.show.spec import in_order, order
from nmsweep.results.read import FIELDS, Results
from nmsweep.results.tidy import data_kind

_FIELDS = ("data", *FIELDS, "tasks", "variant", "status")
_NUMBERS = ("accuracy", "drop", "relative", "flips", "perplexity", "ratio", "kl", "agreement")
_DENSITIES = {"density": "density", "flops_density": "linear FLOPs kept", "bits": "metadata bits"}


class _Words:
    """Assigns a number to each distinct text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}

    def __call__(self, text: object) -> int:
        word = str(text)
        if word not in self._places:
            self._places[word] = len(self.texts)
            self.texts.append(word)
        return self._places[word]


def page_data(results: Results, scores: Scores, rerun: Mapping[str, str]) -> dict[str, Any]:
    """Return plain values for JSON: one row for each cell and kind of data, failed cells too.

    Args:
        results: the records.
        scores: their numbers.
        rerun: the command that runs a cell again, by cell id.
    """
    words = _Words()
    cells = list(map(str, results.cells.index))
    place = {cell: number for number, cell in enumerate(cells)}
    rows = _rows(results, scores)
    kinds = _kinds()
    columns = [kind[key] for kind in kinds for key in ("name", "low", "high") if key in kind]
    values = {name: [_number(value) for value in rows[name].tolist()] for name in columns}
    fields = {name: [words(value) for value in rows[name].tolist()] for name in _FIELDS}
    return {
        "n": len(rows), "ids": rows["cell_id"].tolist(), "cell": [place[cell] for cell in rows["cell_id"]],
        "fields": fields, "values": values, "numbers": kinds,
        "tasks": _tasks(rows, scores, words),
        "rerun": [rerun[cell] for cell in cells],
        "errors": results.cells["error"].tolist(),
        "provenance": _provenance(results, cells, words),
        "order": _order(fields, words), "words": words.texts,
    }  # fmt: skip


def _rows(results: Results, scores: Scores) -> pd.DataFrame:
    cells = results.cells[[*FIELDS, "tasks", "variant", "status"]]
    tasks = cells.loc[cells["status"] == "failed", "tasks"]
    failed = pd.DataFrame([(cell, data) for cell, names in tasks.items() for data in _kinds_of(names)], columns=["cell_id", "data"])  # fmt: skip
    done = [
        by_cell(results, scores, data).drop(columns=[*FIELDS, "variant"]).assign(data=data) for data in ("mini", "real")
    ]
    numbers = pd.concat([*(part.rename_axis("cell_id").reset_index() for part in done if len(part)), failed])
    return in_order(numbers.join(cells, on="cell_id")).reset_index(drop=True)


def _kinds_of(tasks: object) -> list[str]:
    return sorted({data_kind(task) for task in str(tasks).split("+") if task})


def _number(value: Any) -> float | None:
    """Round to six digits, more than the page shows; None for JSON unless finite."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _kinds() -> list[dict[str, Any]]:
    """Columns of numbers: name, title, scale, digits, and the names of the interval's columns."""
    kinds = []
    for quantity in map(QUANTITIES.__getitem__, _NUMBERS):
        kinds.append({name: getattr(quantity, name) for name in ("name", "title", "scale", "digits")})
        if quantity.low:
            kinds[-1] |= {"low": f"{quantity.name}_low", "high": f"{quantity.name}_high"}
    return kinds + [{"name": name, "title": title, "scale": 1, "digits": 3} for name, title in _DENSITIES.items()]


def _tasks(rows: pd.DataFrame, scores: Scores, words: _Words) -> list[list[list[Any]]]:
    """Numbers of each row's tasks, in the order in which the script reads them."""
    table = scores.per_task.copy()
    for text, task in (("change", "drop"), ("low", "drop_low"), ("high", "drop_high")):
        other = {"change": "ratio", "low": "ratio_low", "high": "ratio_high"}[text]
        table[text] = table[task].fillna(table[other])
    numbers = ("value", "dense", "change", "low", "high", "lost", "gained", "changed", "p_value", "p_holm", "mean_abs_delta", "kl", "top1_agreement")  # fmt: skip
    columns = [table[name].tolist() if name in table else [math.nan] * len(table) for name in numbers]
    by_cell: dict[tuple[str, str], list[list[Any]]] = {}
    heads = zip(*(table[name].tolist() for name in ("cell_id", "data", "task", "metric", "n_items")), strict=True)
    for (cell, data, task, metric, n_items), *values in zip(heads, *columns, strict=True):
        by_cell.setdefault((cell, data), []).append([words(task), words(metric), int(n_items), *map(_number, values)])
    return [by_cell.get(key, []) for key in zip(rows["cell_id"].tolist(), rows["data"].tolist(), strict=True)]


def _provenance(results: Results, cells: list[str], words: _Words) -> dict[str, Any]:
    """Columns by name: numbers, or words."""
    known = [results.provenance.get(cell, {}) for cell in cells]
    columns: dict[str, Any] = {}
    for name in ("time_s", "tokens", "peak_memory_bytes"):
        columns[name] = {"numbers": [record.get(name) for record in known]}
    for name in ("finished", "device", "git", "command"):
        columns[name] = {"words": [words(record.get(name) or "") for record in known]}
    columns["versions"] = {"words": [words(", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items() if v)) for record in known]}  # fmt: skip
    models = [record.get("model") or {} for record in known]
    columns["model fingerprint"] = {"words": [words(model.get("fingerprint", "")) for model in models]}
    columns["folder"] = {"words": [words(place.name) for place in results.cells["place"]]}
    return columns


def _order(fields: Mapping[str, list[int]], words: _Words) -> list[int]:
    """Rank of each word among the words of its field."""
    ranks = [0] * len(words.texts)
    for name, column in fields.items():
        for rank, word in enumerate(sorted(set(column), key=lambda word: order(name, words.texts[word]))):
            ranks[word] = max(ranks[word], rank)
    return ranks
