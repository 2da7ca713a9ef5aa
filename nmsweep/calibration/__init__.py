"""Calibration: statistics and learned parameters from a text, block by block, and patterns for single layers."""

from nmsweep.calibration.fit import fit as fit
from nmsweep.calibration.store import Calibrated as Calibrated
