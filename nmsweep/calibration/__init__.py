"""What stages need to know from a text, block by block: statistics, learned parameters, and the file they are kept in."""

from nmsweep.calibration.fit import fit as fit
from nmsweep.calibration.store import Calibrated as Calibrated
from nmsweep.calibration.store import calibrate as calibrate
