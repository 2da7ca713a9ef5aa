"""What measuring one task gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from nmsweep.results.record import Metric

Advance = Callable[[int], None]
"""Called with the number of tokens that were just computed, for the progress display."""


@dataclass(frozen=True)
class TaskResult:
    """The numbers of one task and the rows they come from; `n_tokens` computed, padding excluded."""

    metrics: Sequence[Metric]
    samples: pd.DataFrame
    n_tokens: int
    scoring: str
