"""What the processes beside a report need, imported once before they part; to be imported for that alone."""

import gc

import nmsweep.report.drawings
import nmsweep.report.samples
import nmsweep.report.tidy  # noqa: F401

gc.freeze()  # a collection in a process that parted would write to, and so copy, the pages that all share
