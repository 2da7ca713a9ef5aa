"""Records to tables, figures and one page. Reads files only; no torch.

Nothing is imported here: `command.report` is the way in, and processes that read samples need no more than that.
"""
