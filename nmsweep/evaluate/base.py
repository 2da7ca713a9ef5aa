"""The result of measuring a task."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from nmsweep.results.record import Metric


@dataclass(frozen=True)
class TaskResult:
    """The result of measuring one task.

    Attributes:
        metrics: its numbers.
        samples: one row an item or window, from which the numbers can be recomputed.
        n_tokens: tokens computed, without padding.
        scoring: how requests were answered, in words.
    """

    metrics: Sequence[Metric]
    samples: pd.DataFrame
    n_tokens: int
    scoring: str
