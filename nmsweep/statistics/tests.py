"""Significance tests of paired right-or-wrong items."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc

from nmsweep.statistics.intervals import Floats


def mcnemar(lost: ArrayLike, gained: ArrayLike) -> Floats:
    """Return the exact two-sided p-values of McNemar's test.

    Args:
        lost: items right only in the dense cell, any shape.
        gained: items right only in the sparse cell, the same shape.

    Returns:
        Twice the smaller tail of the binomial distribution, at most 1; 1 where nothing changed.

    Source: McNemar 1947, with the binomial distribution instead of χ².
    """
    fewer, more = np.minimum(lost, gained), np.maximum(lost, gained)
    # betainc is P(at most `fewer` of `fewer` + `more`), as in `scipy.stats.binomtest`
    tail = betainc(np.maximum(more, 1), fewer + 1, 0.5)
    return np.where(more > 0, np.minimum(1.0, 2 * tail), 1.0)


def holm(p_values: ArrayLike) -> Floats:
    """Return Holm's adjusted p-values of one family, in the same order; NaN stays NaN and is not a member.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, math.nan)
    members = np.flatnonzero(~np.isnan(p))
    order = members[np.argsort(p[members], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted
