"""Records to tables, figures and one page. Reads files only; no torch."""

from nmsweep.report.build import make_report as make_report

__all__ = ["make_report"]
