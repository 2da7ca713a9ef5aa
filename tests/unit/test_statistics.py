"""Paired statistics against SciPy and statsmodels, and their coverage by simulation."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from nmsweep.errors import InputError
from nmsweep.statistics.comparison import compare, holm_by_task
from nmsweep.statistics.statistics import Pairs, average, bootstrap_means, holm, interval, mcnemar

JOINT = (0.55, 0.12, 0.06, 0.27)
"""Share of items right in both cells, only in the dense one, only in the sparse one, in neither."""


def drawn(seed: int, n: int = 300, joint: Sequence[float] = JOINT, task: str = "made") -> Pairs:
    outcome = np.random.default_rng(seed).choice(4, size=n, p=joint)
    return Pairs(task, "acc", np.isin(outcome, (0, 1)).astype(float), np.isin(outcome, (0, 2)).astype(float))


def continuous(seed: int, n: int = 150) -> Pairs:
    draw = np.random.default_rng(seed)
    dense = draw.gamma(2.0, size=n)
    return Pairs("made", "loss", dense, dense + draw.normal(0.2, 0.3, size=n))


def drop_interval(pairs: Pairs, seed: int = 0, n_resamples: int = 10_000) -> tuple[float, float]:
    means = bootstrap_means(pairs, seed, n_resamples)
    return interval(means[:, 0] - means[:, 1])


@pytest.mark.parametrize("pairs", [drawn(1), drawn(2, n=60), continuous(3)], ids=["binary", "few", "continuous"])
def test_the_interval_is_scipys(pairs: Pairs) -> None:
    theirs = stats.bootstrap(
        (pairs.dense, pairs.sparse), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    step = 1 / len(pairs) if pairs.is_binary else 0.05 * (theirs.high - theirs.low)  # counts move in whole items
    assert drop_interval(pairs) == pytest.approx((theirs.low, theirs.high), abs=1.01 * step)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth = JOINT[1] - JOINT[2]
    ends = [drop_interval(drawn(seed, n=200), seed, 2000) for seed in range(1000)]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.925 <= covered <= 0.97  # 95 % nominal; the simulation's own standard error is 0.7 %


def test_the_interval_of_an_average_holds_the_truth_as_often_as_it_says() -> None:
    truth = (JOINT[1] - JOINT[2] + 0.2) / 2
    hits = []
    for seed in range(400):
        tasks = [drawn(seed, 200, task="a"), drawn(seed + 10_000, 100, (0.4, 0.25, 0.05, 0.3), task="b")]
        found = average(tasks, seed)
        hits.append(found.drop_low <= truth <= found.drop_high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    pairs = drawn(0, n=1000)
    shuffled = Pairs("made", "acc", pairs.dense, np.random.default_rng(1).permutation(pairs.sparse))
    narrow, wide = (high - low for low, high in map(drop_interval, (pairs, shuffled)))
    assert narrow < 0.8 * wide


def test_the_same_seed_gives_the_same_interval_and_tasks_have_their_own_streams() -> None:
    pairs = drawn(0)
    assert drop_interval(pairs, 3) == drop_interval(pairs, 3)
    other = Pairs("another", pairs.metric, pairs.dense, pairs.sparse)
    assert not np.array_equal(bootstrap_means(pairs, 3), bootstrap_means(other, 3))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (14, 3), (2, 19), (150, 110)])
def test_mcnemar_is_statsmodels_exact_test(lost: int, gained: int) -> None:
    theirs = their_mcnemar([[40, lost], [gained, 30]], exact=True).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, theirs), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_statsmodels(seed: int) -> None:
    p = np.random.default_rng(seed).beta(0.3, 2, size=13)
    p[[2, 5]] = p[7]  # ties
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_leaves_what_has_no_p_value_out_of_the_family() -> None:
    adjusted = holm([0.01, math.nan, 0.04])
    assert math.isnan(adjusted[1])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.04])


def test_a_family_is_one_task_and_metric() -> None:
    table = pd.DataFrame({"task": list("aabb"), "metric": "acc", "p_value": [0.01, 0.02, 0.03, 0.5]})
    assert holm_by_task(table).tolist() == pytest.approx([0.02, 0.02, 0.06, 0.5])


def samples(task: str, loglikelihoods: Sequence[Sequence[float]], gold: Sequence[int]) -> pd.DataFrame:
    rows = []
    for item, (values, right) in enumerate(zip(loglikelihoods, gold, strict=True)):
        chars = [4, 8][: len(values)]
        norm = int(np.argmax(np.divide(values, chars)))
        rows.append(
            {
                "task": task, "item": item, "doc_hash": f"hash{item}", "loglikelihoods": list(values),
                "choice_chars": chars, "prediction": int(np.argmax(values)), "gold": str(right),
                "metric_acc": float(np.argmax(values) == right), "metric_acc_norm": float(norm == right),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def test_a_comparison_counts_what_changed() -> None:
    dense = samples("t", [[-1, -9], [-1, -9], [-9, -1], [-1, -9]], [0, 0, 1, 1])
    sparse = samples("t", [[-1, -9], [-9, -1], [-9, -1.5], [-9, -1]], [0, 0, 1, 1])
    table = compare(dense, sparse.sample(frac=1, random_state=0)).set_index("metric")
    acc = table.loc["acc"]
    assert (acc["dense"], acc["value"], acc["drop"], acc["n_items"]) == (0.75, 0.75, 0.0, 4)
    assert (acc["lost"], acc["gained"], acc["flip_rate"], acc["changed"]) == (0.25, 0.25, 0.5, 0.5)
    assert acc["mean_abs_delta"] == pytest.approx((8 * 4 + 0.5) / 8)
    assert acc["p_value"] == 1.0
    assert acc["drop_low"] < 0 < acc["drop_high"]


def test_the_choice_of_acc_norm_is_the_likeliest_per_character() -> None:
    dense = samples("t", [[-3, -4]], [0])  # raw: first; a character: second
    sparse = samples("t", [[-3, -9]], [0])
    table = compare(dense, sparse).set_index("metric")
    assert table.loc["acc", "changed"] == 0
    assert table.loc["acc_norm", "changed"] == 1
    assert table.loc["acc_norm", "gained"] == 1


def test_a_texts_ratio_and_its_divergence() -> None:
    n_tokens, nll = 127, np.array([300.0, 350.0, 330.0])
    dense = pd.DataFrame({"task": "text", "item": range(3), "nll": nll, "n_tokens": n_tokens})
    sparse = dense.assign(
        nll=nll * 1.1, kl=[0.2, 0.4, math.nan], top1_agreement=[0.9, 0.7, math.nan], n_compared=[127, 127, 0]
    )
    (row,) = compare(dense, sparse).itertuples()
    assert row.ratio == pytest.approx(math.exp(98 / 3 / 127))
    assert row.ratio_low < row.ratio < row.ratio_high
    assert (row.kl, row.top1_agreement) == pytest.approx((0.3, 0.8))
    assert math.isnan(row.drop)


def test_cells_of_other_items_are_not_compared() -> None:
    dense = samples("t", [[-1, -9], [-1, -9]], [0, 0])
    with pytest.raises(InputError, match="2 and 1 items"):
        compare(dense, dense[:1])
    with pytest.raises(InputError, match="not the same ones"):
        compare(dense, dense.assign(doc_hash="other"))


def test_no_flip_at_all_is_no_evidence() -> None:
    pairs = drawn(0, joint=(0.5, 0, 0, 0.5))
    assert drop_interval(pairs) == (0.0, 0.0)
    assert mcnemar(0, 0) == 1.0
