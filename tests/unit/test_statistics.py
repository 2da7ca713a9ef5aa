"""Paired statistics against SciPy and statsmodels, and their coverage by simulation."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from nmsweep.errors import InputError
from nmsweep.results.samples import ItemGroup
from nmsweep.statistics.comparison import compare, compare_cells, holm_by_task, quantity_intervals
from nmsweep.statistics.intervals import percentile_interval, resample_counts
from nmsweep.statistics.tests import holm, mcnemar

Floats = NDArray[np.float64]
JOINT = (0.55, 0.12, 0.06, 0.27)
"""Share of items right in both cells, only in the dense one, only in the sparse one, in neither."""


def drawn(seed: int, n: int = 300, joint: Sequence[float] = JOINT, n_draws: int = 1, task: str = "made") -> ItemGroup:
    """Pairs of a dense and a sparse cell whose items are right or wrong, one pair a draw."""
    outcome = np.random.default_rng(seed).choice(4, size=(n_draws, n), p=joint)
    return group_of(np.isin(outcome, (0, 1)).astype(float), np.isin(outcome, (0, 2)).astype(float), task)


def continuous(seed: int, n: int = 150) -> ItemGroup:
    draw = np.random.default_rng(seed)
    dense = draw.gamma(2.0, size=n)
    return group_of(dense[None], (dense + draw.normal(0.2, 0.3, size=n))[None])


def group_of(dense: Floats, sparse: Floats, task: str = "made") -> ItemGroup:
    """One pair of cells for each row of [pairs, items]."""
    names = [f"{kind}{number}" for kind in ("dense", "sparse") for number in range(len(dense))]
    rows = {name: row for row, name in enumerate(names)}
    return ItemGroup(task, rows, np.arange(dense.shape[1]), {"acc": np.concatenate([dense, sparse])})


def drop_intervals(*tasks: ItemGroup) -> list[tuple[float, float]]:
    """Of each pair's mean drop over tasks."""
    n_pairs = len(tasks[0].rows) // 2
    dense, sparse = ([f"{kind}{number}" for number in range(n_pairs)] for kind in ("dense", "sparse"))
    low, high = quantity_intervals("drop", [(task, "acc") for task in tasks], dense, sparse)
    return list(zip(low.tolist(), high.tolist(), strict=True))


@pytest.mark.parametrize("pairs", [drawn(1), drawn(2, n=60), continuous(3)], ids=["binary", "few", "continuous"])
def test_the_interval_is_scipys(pairs: ItemGroup) -> None:
    dense, sparse = pairs.values["acc"]
    theirs = stats.bootstrap(
        (dense, sparse), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    binary = np.isin(dense, (0, 1)).all()
    step = 1 / len(dense) if binary else 0.05 * (theirs.high - theirs.low)  # counts move in whole items
    (own,) = drop_intervals(pairs)
    assert own == pytest.approx((theirs.low, theirs.high), abs=1.01 * step)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth = JOINT[1] - JOINT[2]
    ends = drop_intervals(drawn(0, 200, n_draws=1000))
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.925 <= covered <= 0.97  # 95 % nominal; the simulation's own standard error is 0.7 %


def test_the_interval_of_an_average_holds_the_truth_as_often_as_it_says() -> None:
    truth = (JOINT[1] - JOINT[2] + 0.2) / 2
    tasks = drawn(0, 200, n_draws=400, task="a"), drawn(1, 100, (0.4, 0.25, 0.05, 0.3), n_draws=400, task="b")
    hits = [low <= truth <= high for low, high in drop_intervals(*tasks)]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    pairs = drawn(0, n=1000)
    dense, sparse = pairs.values["acc"]
    shuffled = group_of(dense[None], np.random.default_rng(1).permutation(sparse)[None])
    narrow, wide = (high - low for ((low, high),) in map(drop_intervals, (pairs, shuffled)))
    assert narrow < 0.8 * wide


def test_the_same_task_and_number_of_items_gives_the_same_resamples() -> None:
    assert drop_intervals(drawn(0)) == drop_intervals(drawn(0))
    counts = resample_counts("made", 40)
    assert (counts.sum(axis=0) == 40).all()
    resample_counts.cache_clear()
    assert np.array_equal(counts, resample_counts("made", 40))
    assert not np.array_equal(counts, resample_counts("another", 40))


def test_an_interval_with_a_missing_replicate_is_missing() -> None:
    low, high = percentile_interval(np.array([[0.0, 1.0], [0.0, math.nan]]))
    assert (low[0], high[0]) == pytest.approx((0.025, 0.975))
    assert np.isnan([low[1], high[1]]).all()


def grouped(right: Sequence[int], subtask: Sequence[str], *, alike: bool) -> pd.DataFrame:
    sizes = {name: subtask.count(name) for name in subtask}
    table = pd.DataFrame({"task": "group", "item": range(len(right)), "subtask": subtask, "metric_acc": np.array(right, float)})  # fmt: skip
    return table.assign(weight_acc=[1 / (len(sizes) * sizes[name]) for name in subtask]) if alike else table


def test_subtasks_that_count_alike_are_resampled_each_by_itself() -> None:
    """A small subtask without changes and a large one with many: the mean is over subtasks, whatever their size."""
    names = ["small"] * 10 + ["large"] * 90
    dense, sparse = [1] * 100, [1] * 10 + [1, 0, 0] * 30
    table = {alike: compare(grouped(dense, names, alike=alike), grouped(sparse, names, alike=alike)) for alike in (True, False)}  # fmt: skip
    ((_, alike),), ((_, by_size),) = (table[key].iterrows() for key in (True, False))
    assert (alike["dense"], alike["value"], alike["drop"]) == pytest.approx((1, 2 / 3, 1 / 3))
    assert by_size["drop"] == pytest.approx(0.6)
    assert alike["drop_low"] < 1 / 3 < alike["drop_high"] < by_size["drop_low"]
    large = np.array(sparse[10:])
    expected = 1.96 * large.std() / math.sqrt(90) / 2  # the small subtask has no variance
    assert alike["drop_high"] - alike["drop_low"] == pytest.approx(2 * expected, rel=0.05)
    same_size = compare(grouped(dense, ["a", "b"] * 50, alike=True), grouped(sparse, ["a", "b"] * 50, alike=True))
    assert same_size["drop"].item() == pytest.approx(0.6)


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


def test_cells_with_other_choices_have_no_changed_answers() -> None:
    """A task scored with unconditional likelihoods has twice as many of them."""
    dense, sparse = samples("t", [[-3, -4]], [0]), samples("t", [[-3, -9]], [0])
    longer = sparse.assign(loglikelihoods=[[-3.0, -9.0, -1.0, -1.0]])
    assert compare(dense, longer)["changed"].isna().all()
    assert compare(dense, longer)["mean_abs_delta"].isna().all()
    both = compare(dense.assign(loglikelihoods=[[-3.0, -4.0, -1.0, -1.0]]), longer).set_index("metric")
    assert both.loc["acc", "changed"] == 0
    assert both.loc["acc", "mean_abs_delta"] == pytest.approx(5 / 4)


def test_cells_without_a_dense_one_among_the_same_items_are_left_out() -> None:
    group = drawn(0, n=20)
    assert compare_cells([group], {"sparse0": "dense0"}, {"made": ["acc"]})["n_items"].tolist() == [20]
    assert compare_cells([group], {"sparse0": "other"}, {"made": ["acc"]}).empty


def test_cells_of_other_items_are_not_compared() -> None:
    dense = samples("t", [[-1, -9], [-1, -9]], [0, 0])
    with pytest.raises(InputError, match="2 and 1 items"):
        compare(dense, dense[:1])
    with pytest.raises(InputError, match="not the same ones"):
        compare(dense, dense.assign(doc_hash="other"))


def test_no_flip_at_all_is_no_evidence() -> None:
    assert drop_intervals(drawn(0, joint=(0.5, 0, 0, 0.5))) == [(0.0, 0.0)]
    assert mcnemar(0, 0) == 1.0
