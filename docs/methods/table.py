"""Turn the records of `nmsweep experiment=methods_table` into table.csv and that into a Markdown table.

python docs/methods/table.py RESULTS_DIR...     # writes docs/methods/table.csv from the records
python docs/methods/build.py                    # then puts the table into README.md of this folder
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from nmsweep.results.record import cell_folders

HERE = Path(__file__).parent
COLUMNS = (
    "model", "pattern", "criterion", "mitigation", "perplexity", "ratio_to_act", "low", "high", "n_windows", "seqlen", "dtype", "device",
)  # fmt: skip


def read_cells(folders: list[Path]) -> pd.DataFrame:
    """One row a cell with its windows' mean negative log-likelihoods in nats, `nll` [n_windows]."""
    rows = []
    for folder in folders:
        metric = pd.read_csv(folder / "metrics.csv", keep_default_na=False).query("metric == 'perplexity'").iloc[0]
        samples = pd.read_parquet(folder / "samples.parquet")
        samples = samples[samples["task"] == metric["task"]].sort_values("item")
        provenance = json.loads((folder / "provenance.json").read_text())
        rows.append(
            {
                **{key: metric[key] for key in ("model", "pattern", "criterion", "mitigation", "dtype")},
                "perplexity": float(metric["value"]),
                "nll": (samples["nll"] / samples["n_tokens"]).to_numpy(),
                "n_windows": len(samples),
                "seqlen": int(samples["n_tokens"].iloc[0]) + 1,
                "device": provenance["device"],
            }
        )
    return pd.DataFrame(rows)


def paired(cells: pd.DataFrame) -> pd.DataFrame:
    """Each cell's perplexity over that of `act` alone under the same pattern, with the 95 % interval of Student's t over
    the windows' paired differences.
    """
    plain = cells[(cells["criterion"] == "act") & (cells["mitigation"] == "none")]
    base = {(row.model, row.pattern): row.nll for row in plain.itertuples()}
    ratios = []
    for row in cells.itertuples():
        other = base.get((row.model, row.pattern))
        if other is None or len(other) != len(row.nll):
            ratios.append((np.nan, np.nan, np.nan))
            continue
        change = row.nll - other
        spread = (
            change.std(ddof=1) / np.sqrt(len(change)) * stats.t.ppf(0.975, len(change) - 1)
            if len(change) > 1
            else np.nan
        )
        ratios.append(tuple(np.exp([change.mean(), change.mean() - spread, change.mean() + spread])))
    return cells.assign(**dict(zip(("ratio_to_act", "low", "high"), zip(*ratios, strict=True), strict=True)))


def collect(results: list[Path]) -> pd.DataFrame:
    """The table of one or more results folders, in an order that does not depend on them."""
    cells = paired(read_cells([folder for one in results for folder in cell_folders(one)]))
    return cells[list(COLUMNS)].sort_values(["model", "pattern", "criterion", "mitigation"], ignore_index=True)


def read_table(file: Path = HERE / "table.csv") -> pd.DataFrame:
    """The collected table; only numbers may be missing ("none" is a name)."""
    return pd.read_csv(file, keep_default_na=False, na_values={key: [""] for key in ("ratio_to_act", "low", "high")})


def markdown(table: pd.DataFrame) -> str:
    """One row a method; perplexity, and where it differs from `act` alone the ratio with its interval."""
    models, patterns = sorted(table["model"].unique(), reverse=True), ["2:4", "8:16"]
    heads = [f"{model}, {pattern}" for model in models for pattern in patterns]
    lines = ["| method | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(heads)]
    methods = table[["criterion", "mitigation"]].drop_duplicates()
    methods = methods.assign(order=[_place(row.criterion, row.mitigation) for row in methods.itertuples()])
    for method in methods.sort_values(["order", "criterion", "mitigation"]).itertuples():
        name = "dense" if method.criterion == "none" else method.criterion
        name += "" if method.mitigation == "none" else f" + {method.mitigation}"
        same = table[(table["criterion"] == method.criterion) & (table["mitigation"] == method.mitigation)]
        cells = [
            _cell(same, model, "dense" if name == "dense" else pattern) for model in models for pattern in patterns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(_made(table[table["model"] == model], model) for model in models)])


def _made(rows: pd.DataFrame, model: str) -> str:
    """How much text a model's numbers are of, and what made them."""
    n_windows, seqlen = rows["n_windows"].iloc[0], rows["seqlen"].iloc[0]
    devices = " and ".join(sorted(rows["device"].unique()))
    return f"{model}: {n_windows} windows of {seqlen} tokens, {rows['dtype'].iloc[0]}, {devices}."


def _place(criterion: str, mitigation: str) -> int:
    """Dense, act, other criteria, mitigations, weights."""
    if criterion == "none":
        return 0
    if mitigation != "none":
        return 3
    return {"act": 1, "wt": 4, "wanda": 4, "sparsegpt": 4}.get(criterion, 2)


def _cell(same: pd.DataFrame, model: str, pattern: str) -> str:
    found = same[(same["model"] == model) & (same["pattern"] == pattern)]
    if found.empty:
        return "–"
    row = found.iloc[0]
    if pattern == "dense" or (row["criterion"] == "act" and row["mitigation"] == "none"):
        return f"{row['perplexity']:.4g}"
    ratio, low, high = (_ratio(row[key]) for key in ("ratio_to_act", "low", "high"))
    return f"{row['perplexity']:.4g} (×{ratio}, {low}–{high})"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2e}" if value >= 1000 else f"{value:.1f}"


if __name__ == "__main__":
    collect([Path(word) for word in sys.argv[1:]]).to_csv(HERE / "table.csv", index=False, float_format="%.6g")
