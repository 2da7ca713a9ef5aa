"""The hardware view: the metadata and traffic of N:M formats, computed from patterns and layer shapes. Not measured."""

import math
from pathlib import Path

import pandas as pd

from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.report.numbers.quantities import QUANTITIES
from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import kind_of
from nmsweep.results.layout import LAYERS
from nmsweep.results.read import Results

_KEY = ["model", "targets", "dtype", "pattern"]
_BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}

COLUMNS = {
    "density": "values kept",
    "combinatorial_bits": "metadata, bits per element: ⌈log₂ C(M,N)⌉/M",
    "index_bits": "metadata with one index per kept value",
    "bitmask_bits": "metadata with a bit mask",
    "compressed": "compressed ÷ dense activation size",
    "bandwidth_saved": "activation traffic saved",
    "dense_bytes_per_token": "inputs of the target layers, bytes per token, dense",
    "compressed_bytes_per_token": "the same, compressed",
    "linear_flops_kept": "linear FLOPs kept",
}
"""Theoretical columns of the view and their titles."""


def metadata_bits(pattern: Pattern) -> dict[str, float]:
    """Return each coding's metadata in bits per element; NaN where it does not apply (an unstructured pattern has no groups)."""
    grouped = pattern.kind == "n:m"
    return {
        "combinatorial_bits": pattern.metadata_bits if pattern.metadata_bits is not None else math.nan,
        "index_bits": pattern.n * math.ceil(math.log2(pattern.m)) / pattern.m if grouped else math.nan,
        "bitmask_bits": 1.0,
    }


def compressed_share(pattern: Pattern, value_bits: int) -> float:
    """Return compressed over dense size of an activation: the kept values and the smallest metadata coding."""
    least = min(bits for bits in metadata_bits(pattern).values() if not math.isnan(bits))
    return (1 - pattern.sparsity) + least / value_bits


def hardware_view(results: Results, scores: Scores) -> pd.DataFrame:
    """Return one row for each model, pattern, targets and dtype with pruned activations: theory, then the measured drop.

    A policy gives each layer its own pattern, so it has no row.

    The measured columns are the mean drop (in points) and perplexity ratio of criterion `act` without mitigation, and the
    smallest of any method, for each kind of data.
    """
    sparse = results.done[(results.done["operand"] == "activations")]
    sparse = sparse[[kind_of(pattern) not in ("dense", "policy") for pattern in sparse["pattern"]]]
    measured = _measured(sparse, scores)
    rows = []
    for key, same in sparse.groupby(_KEY, sort=True):
        model, targets, dtype, pattern = map(str, key)
        widths = _input_bytes(Path(same["place"].iloc[0]), dtype)
        parsed = parse_pattern(pattern)
        share = compressed_share(parsed, _BITS.get(dtype, 16))
        rows.append(
            {
                "model": model, "targets": targets, "dtype": dtype, "pattern": pattern, "density": 1 - parsed.sparsity,
                **metadata_bits(parsed), "compressed": share, "bandwidth_saved": 1 - share,
                "dense_bytes_per_token": widths, "compressed_bytes_per_token": widths * share,
                "linear_flops_kept": float((1 - same["flops_share"] * same["sparsity"]).mean()),
                **{str(name): column.get(key, math.nan) for name, column in measured.items()},
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _input_bytes(place: Path, dtype: str) -> float:
    """Bytes per token of the target layers' inputs, each layer by itself; NaN without layers.csv."""
    try:
        widths = pd.read_csv(place / LAYERS)["in_features"]
    except (OSError, ValueError, KeyError):
        return math.nan
    return float(widths.sum()) * _BITS.get(dtype, 16) / 8 if len(widths) else math.nan


def _measured(cells: pd.DataFrame, scores: Scores) -> dict[str, pd.Series]:
    """The measured columns, each indexed by `_KEY`."""
    known = scores.per_cell.join(cells[[*_KEY, "criterion", "mitigation"]], on="cell_id", how="inner")
    columns: dict[str, pd.Series] = {}
    for (data, is_text), same in known.groupby(["data", "is_text"], sort=True):
        quantity = QUANTITIES["ratio" if is_text else "drop"]
        of_row = same[_KEY].assign(value=same[quantity.column] * quantity.scale)
        plain = of_row[(same["criterion"] == "act") & (same["mitigation"] == "none")]
        columns[f"{data}: {quantity.title}, act"] = plain.groupby(_KEY)["value"].mean()
        columns[f"{data}: {quantity.title}, best"] = of_row.groupby(_KEY)["value"].min()
    return columns
