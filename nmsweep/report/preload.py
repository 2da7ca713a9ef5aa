"""What the processes beside a report need, imported once before they part; to be imported for that alone."""

import gc

import nmsweep.report.numbers.samples
import nmsweep.report.show.drawings
import nmsweep.results.tidy  # noqa: F401

gc.freeze()  # a collection in a process that parted would write to, and so copy, the pages that all share
