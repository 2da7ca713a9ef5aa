"""`act`: rank channels by the magnitude of the activation."""

from dataclasses import dataclass

from nmsweep.methods.base import Criterion


@dataclass(frozen=True)
class Act(Criterion):
    """w_j = 1, so the score is ``|z_j|``. No calibration.

    Source: arXiv:2509.22166, ACT.
    """
