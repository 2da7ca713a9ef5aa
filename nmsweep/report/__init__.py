"""Records to tables and plots. Reads files only; no torch."""

from nmsweep.report.build import make_report as make_report

__all__ = ["make_report"]
