"""What stages need to know from a text, block by block: statistics, learned parameters, and the file they are kept in."""

from nmsweep.calibrate.fit import fit as fit
from nmsweep.calibrate.store import Calibrated as Calibrated
from nmsweep.calibrate.store import calibrate as calibrate
