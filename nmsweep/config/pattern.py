"""Sparsity patterns, `dense`, `N:M`, `p%` and `threshold:p%`, as plain numbers (no torch).

Source: METHODS, "Patterns"; arXiv:2509.22166 for N:M, arXiv:2408.14690 (TEAL) for thresholds.
"""

import math
import re
import warnings
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from nmsweep.errors import InputError

Kind = Literal["dense", "n:m", "unstructured", "threshold"]

_NM = re.compile(r"(\d+):(\d+)")
_PERCENT = re.compile(r"(threshold:)?(\d+(?:\.\d+)?)%")
_POLICY = re.compile(r"(greedy|recipe-[A-Za-z0-9._+-]+):(.+)")
_ALLOWED = "allowed: dense, N:M with 0 < N <= M (N kept of M), p% with 0 < p < 100 (share set to zero), threshold:p%"


class Budget(TypedDict, total=False):
    """How many channels are kept, as `kernels.prune` takes it: `n` of each `m`, or `kept` of the whole row."""

    n: int
    m: int
    kept: int


@dataclass(frozen=True)
class Pattern:
    """A rule for the number of channels kept in each token.

    Attributes:
        kind: the rule.
        n: channels kept in each group; 0 unless `kind` is ``"n:m"``.
        m: consecutive channels in a group; 0 unless `kind` is ``"n:m"``.
        percent: share of channels set to zero, in percent; 0 unless unstructured or threshold.
        policy: ``greedy`` or ``recipe-<name>`` if the layers share this budget; empty if all have this pattern.
    """

    kind: Kind
    n: int = 0
    m: int = 0
    percent: float = 0.0
    policy: str = ""

    def __str__(self) -> str:
        return f"{self.policy}:{self.rule}" if self.policy else self.rule

    @property
    def rule(self) -> str:
        """The pattern without its policy."""
        match self.kind:
            case "dense":
                return "dense"
            case "n:m":
                return f"{self.n}:{self.m}"
            case "unstructured":
                return f"{self.percent:g}%"
            case "threshold":
                return f"threshold:{self.percent:g}%"

    @property
    def is_dense(self) -> bool:
        return self.kind == "dense"

    @property
    def sparsity(self) -> float:
        """Nominal share of channels set to zero, 0 to 1."""
        return 1 - self.n / self.m if self.kind == "n:m" else self.percent / 100

    @property
    def slug(self) -> str:
        """The pattern in folder names: ``8-16``, ``50pct``."""
        return str(self).replace(":", "-").replace("%", "pct")

    def kept(self, n_channels: int) -> int:
        """Return the channels kept of `n_channels` of a token; for a threshold, their expected number."""
        if self.kind == "n:m":
            return n_channels // self.m * self.n
        return max(1, round(n_channels * (1 - self.percent / 100)))

    def budget(self, n_channels: int) -> Budget:
        """The exact count for a row of `n_channels`, as `kernels.prune` takes it."""
        return {"n": self.n, "m": self.m} if self.kind == "n:m" else {"kept": self.kept(n_channels)}

    @property
    def metadata_bits(self) -> float | None:
        """Theoretical bits of metadata per element, ⌈log₂ C(M, N)⌉ / M; None unless N:M."""
        if self.kind != "n:m":
            return None
        return math.ceil(math.log2(math.comb(self.m, self.n))) / self.m


def parse_pattern(value: object) -> Pattern:
    """Read a pattern from the command line or from YAML.

    YAML 1.1 reads an unquoted ``8:16`` as the base-60 integer 496. No bare number is a pattern, so
    ``divmod(496, 60)`` gives the text back; a warning says to quote it.

    Raises:
        InputError: `value` is not a pattern.
    """
    if isinstance(value, Pattern):
        return value
    text = str(value).strip()
    if (hit := _POLICY.fullmatch(text)) and not (rule := parse_pattern(hit[2])).is_dense:
        return replace(rule, policy=hit[1])
    if isinstance(value, bool) or value is None:
        raise InputError(f"pattern: {value!r} is not a pattern; {_ALLOWED}")
    if text == "dense":
        return Pattern("dense")
    if text.isdigit():
        n, m = divmod(int(text), 60)
        if not 1 <= n <= m:
            raise InputError(f'pattern: {text} is a number; {_ALLOWED}; in YAML write it in quotes, such as "8:16"')
        warnings.warn(
            f'pattern {text} is read as {n}:{m}: YAML turns an unquoted {n}:{m} into a number; quote it: "{n}:{m}"',
            stacklevel=2,
        )
        return Pattern("n:m", n, m)
    if hit := _NM.fullmatch(text):
        n, m = int(hit[1]), int(hit[2])
        if not 0 < n <= m:
            raise InputError(f"pattern: {text!r} keeps {n} of {m}; {_ALLOWED}")
        return Pattern("n:m", n, m)
    if hit := _PERCENT.fullmatch(text):
        percent = float(hit[2])
        if not 0 < percent < 100:
            raise InputError(f"pattern: {text!r} is outside 0 to 100; {_ALLOWED}")
        return Pattern("threshold" if hit[1] else "unstructured", percent=percent)
    raise InputError(f"pattern: {text!r} is not a pattern; {_ALLOWED}")
