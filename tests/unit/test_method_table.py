"""The table of docs/methods: ratios to `act` with paired intervals."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

TABLE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "table.py"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return runpy.run_path(str(TABLE))


def cell(pattern: str, criterion: str, mitigation: str, nll: Any) -> dict[str, Any]:
    nll = np.asarray(nll)
    return {
        "model": "m", "pattern": pattern, "criterion": criterion, "mitigation": mitigation, "dtype": "float32", "device": "d",
        "perplexity": float(np.exp(nll.mean())), "nll": nll, "n_windows": len(nll), "seqlen": 8,
    }  # fmt: skip


def test_a_ratio_is_of_paired_windows(table: dict[str, Any]) -> None:
    base = np.random.default_rng(0).normal(3, 1, 12)
    change = np.random.default_rng(1).normal(0.1, 0.02, 12)
    found = table["paired"](
        pd.DataFrame(
            [
                cell("dense", "none", "none", base - 1),
                cell("2:4", "act", "none", base),
                cell("2:4", "wina", "none", base + change),
            ]
        )
    )
    interval = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    row = found.iloc[2]
    assert row["ratio_to_act"] == pytest.approx(np.exp(change.mean()))
    assert (row["low"], row["high"]) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert found.loc[0, ["ratio_to_act", "low", "high"]].isna().all()
    text = table["markdown"](found)
    assert text.splitlines()[0] == "| method | m, 2:4 | m, 8:16 |"
    assert [line.split(" | ")[0] for line in text.splitlines()[2:-2]] == ["| dense", "| act", "| wina"]
    assert text.endswith("m: 12 windows of 8 tokens, float32, d.")


def test_the_table_has_every_method_at_both_patterns(table: dict[str, Any]) -> None:
    from nmsweep.config.catalogue import options

    rows = table["read_table"]()
    wanted = {(name, "none") for name in options("criterion")} | {("act", name) for name in options("mitigations")}
    smollm2 = rows[rows["model"] == "smollm2"]
    for pattern in ("2:4", "8:16"):
        same = smollm2[smollm2["pattern"] == pattern]
        assert set(zip(same["criterion"], same["mitigation"], strict=True)) == wanted
    assert (rows["n_windows"] * rows["seqlen"] >= 8192).all()
