"""Tables as Markdown, CSV, LaTeX and HTML. Every word of a record is escaped."""

import html
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import isnan
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from nmsweep.report.numbers.quantities import Quantity
from nmsweep.report.show.spec import Entry, Table

Escape = Callable[[object], str]

MOST_ROWS = 200
"""Rows of a table outside its CSV file, which has all of them."""

_LONG = 45
"""Rows from which a LaTeX table may break over pages."""

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "‖": r"$\Vert$", "†": r"$^{\dagger}$", "×": r"$\times$", "≥": r"$\geq$", "–": "--", "[": "{[}", "]": "{]}", "-": "{-}",
}  # fmt: skip

_MARKS = {
    "markdown": {"best": "**{}**", "tied": "{}†", "span": " {}", "missing": "–", "failed": "failed"},
    "latex": {
        "best": r"\textbf{{{}}}", "tied": r"{}$^{{\dagger}}$", "span": r" {{\scriptsize {}}}", "missing": "--",
        "failed": r"\textit{failed}",
    },
    "html": {
        "best": "<strong>{}</strong>", "tied": "{}<sup>†</sup>", "span": " <small>{}</small>",
        "missing": '<span class="missing">–</span>', "failed": '<span class="failed">failed</span>',
    },
}  # fmt: skip
"""How each format marks an entry."""


def plain(value: object) -> str:
    """Return a record's word on one line, with spaces for control characters."""
    return "".join(
        " " if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in str(value)
    ).strip()


def markdown_text(value: object) -> str:
    """Escape text for a Markdown table."""
    return re.sub(r"([\\`*_{}\[\]<>|~$#!])", r"\\\1", plain(value)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def latex_text(value: object) -> str:
    """Escape text for LaTeX with T1 fonts; other characters become their code point."""
    return "".join(_latex_char(char) for char in plain(value))


def _latex_char(char: str) -> str:
    known = ord(char) < 128 or 0xC0 <= ord(char) <= 0xFF or char in "‘’“”§£"
    return _LATEX.get(char) or (char if known else f"U+{ord(char):04X}")


def html_text(value: object) -> str:
    """Escape text for HTML."""
    return html.escape(plain(value))


def number(value: float, quantity: Quantity) -> str:
    """Scale and round a number for display; zero has no sign."""
    text = f"{value * quantity.scale:.{quantity.digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def span(low: float, high: float, quantity: Quantity) -> str:
    """Return an interval, ``[10.1, 14.2]``; empty where an end is NaN."""
    return "" if isnan(low) or isnan(high) else f"[{number(low, quantity)}, {number(high, quantity)}]"


def entry_text(entry: Entry, quantity: Quantity, format: str, with_span: bool = True) -> str:  # noqa: A002
    """Return an entry with its marks and its interval, in one of the formats of `_MARKS`."""
    marks = _MARKS[format]
    if entry.status != "done":
        return marks[entry.status]
    mark = marks["best"] if entry.best else marks["tied"] if entry.tied else "{}"
    interval = span(entry.low, entry.high, quantity) if with_span else ""
    return mark.format(number(entry.value, quantity)) + (marks["span"].format(interval) if interval else "")


def caption(table: Table) -> str:
    """Return the table's caption, on one line, unescaped."""
    words = [f"{table.spec.title}: {table.quantity.title}"]
    if (
        table.data in ("mini", "real")
        and "task" not in (*table.spec.rows, *table.spec.cols)
        and not table.quantity.text
    ):
        words.append("mean over tasks")
    words += [f"{name} {value}" for name, value in table.constants.items() if (name, value) not in _USUAL]
    if table.data == "mini":
        words.append("shipped mini tasks, not comparable with published numbers")
    return "; ".join(words)


_USUAL = {("mitigation", "none"), ("targets", "all"), ("scope", "all"), ("profile", "strict")}


def legend(table: Table, escape: Escape = plain) -> str:
    """Explain the marks that the table has, and count the rows left out; `escape` is applied to names."""
    entries = table.frame[:MOST_ROWS].to_numpy().ravel().tolist()
    words = []
    if any(entry.best for entry in entries):
        words.append("bold: best of its column" + (f" within {' and '.join(table.front)}" if table.front else ""))
    if any(entry.tied for entry in entries):
        words.append("†: not significantly worse than the best (paired bootstrap, 95 %)")
    if any(span(entry.low, entry.high, table.quantity) for entry in entries):
        words.append("[ ]: 95 % paired bootstrap interval")
    if any(entry.status == "missing" for entry in entries):
        words.append("–: no cell was run")
    if any(entry.status == "failed" for entry in entries):
        words.append("failed: its cell failed")
    if any(len(entry.cells) > 1 and entry.status == "done" for entry in entries):
        words.append("mean over seeds where there are several")
    if (n_more := len(table.frame) - MOST_ROWS) > 0:
        words.append(f"{n_more} more rows are left out: {escape(table.name)}.csv has them all")
    return "; ".join(words)


def _frame(table: Table, escape: Escape) -> pd.DataFrame:
    """The rows to show, with escaped labels."""
    frame = table.frame[:MOST_ROWS].copy()
    frame.index = _labels(frame.index, escape)
    frame.columns = _labels(frame.columns, escape)
    return frame


def _labels(labels: pd.Index, escape: Escape) -> pd.Index:
    keys = [tuple(map(escape, key)) for key in labels]
    names = list(map(escape, labels.names))
    if len(names) == 1:
        return pd.Index([key[0] for key in keys], name=names[0], dtype=object)
    return pd.MultiIndex.from_tuples(keys, names=names)


@lru_cache(maxsize=64)  # used for its own file and for the summary
def to_markdown(table: Table) -> str:
    """Return a heading, the table and its legend."""
    frame = _frame(table, markdown_text).map(lambda entry: entry_text(entry, table.quantity, "markdown"))
    if frame.columns.nlevels > 1:
        frame.columns = [" / ".join(key) for key in frame.columns]
    body = frame.reset_index().to_markdown(index=False, disable_numparse=True, colalign=_aligned(frame))
    return f"### {markdown_text(caption(table))}\n\n{body}\n\n{legend(table, markdown_text)}\n"


def _aligned(frame: pd.DataFrame) -> list[str]:
    return ["left"] * frame.index.nlevels + ["right"] * len(frame.columns)


def to_csv(table: Table) -> pd.DataFrame:
    """Return one row per entry, unscaled, with the cells behind it; all rows."""
    frame = table.frame
    rows, columns = list(frame.index), list(frame.columns)
    entries: list[Entry] = frame.to_numpy().ravel().tolist()
    csv: dict[str, Any] = {
        str(name): [key[at] for key in rows for _ in columns] for at, name in enumerate(frame.index.names)
    }
    csv |= {str(name): [key[at] for key in columns] * len(rows) for at, name in enumerate(frame.columns.names)}
    csv |= {"data": table.data, "metric": table.quantity.name}
    csv |= {name: [getattr(entry, name) for entry in entries] for name in ("value", "low", "high", "status", "best")}
    csv["not_worse"] = [entry.best or entry.tied for entry in entries]
    csv["cells"] = ["+".join(entry.cells) for entry in entries]
    return pd.DataFrame(csv)


def to_latex(table: Table, label: str) -> str:
    """Return a table for ``\\input``; needs booktabs and graphicx, and longtable where it is long."""
    frame = _frame(table, latex_text)
    is_long = len(frame) > _LONG
    styler = _styled(frame, lambda entry: entry_text(entry, table.quantity, "latex", with_span=not is_long))
    text = latex_text(caption(table)) + _latex_legend(legend(table), is_long)
    formats = "l" * frame.index.nlevels + "r" * len(frame.columns)
    if is_long:
        body = styler.to_latex(environment="longtable", hrules=True, column_format=formats, caption=text, label=label, multirow_align="naive")  # fmt: skip
        return f"{{\\scriptsize\\setlength{{\\tabcolsep}}{{3pt}}%\n{body}}}\n"
    body = styler.to_latex(hrules=True, column_format=formats, multirow_align="naive")
    return _FLOAT.format(caption=text, label=label, body=body)


_FLOAT = r"""\begin{{table}}[htbp]
\centering
\caption{{{caption}}}
\label{{{label}}}
\smallskip

\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{%
{body}}}
\end{{table}}
"""

_PREAMBLE = r"""\documentclass{{article}}
\usepackage[T1]{{fontenc}}
\usepackage[margin=2cm]{{geometry}}
\usepackage{{booktabs,graphicx,longtable}}
\begin{{document}}
{inputs}
\end{{document}}
"""


def latex_document(files: Mapping[str, str]) -> str:
    """Return a document that sets tables, given by their file names without ``.tex``."""
    return _PREAMBLE.format(inputs="\n\\clearpage\n".join(f"\\input{{{name}}}" for name in files))


def _latex_legend(words: str, is_long: bool) -> str:
    if is_long:
        words = words.replace("; [ ]: 95 % paired bootstrap interval", "")
    return ". " + latex_text(words) + "." if words else ""


@lru_cache(maxsize=64)  # used for its own file and for the page
def to_html(table: Table) -> str:
    """Return a table element with its caption and legend."""
    frame = _frame(table, html_text)
    styler = _styled(frame, lambda entry: entry_text(entry, table.quantity, "html"))
    styler = styler.set_caption(f"{html_text(caption(table))}<br><small>{html_text(legend(table))}</small>")
    return str(styler.set_uuid(table.name + table.data).to_html(table_attributes='class="numbers"', border=None))


def _styled(frame: pd.DataFrame, show: Callable[[Entry], str]) -> Styler:
    formatter: Any = show
    return Styler(frame, cell_ids=False).format(formatter)


def html_document(table: Table) -> str:
    """Return the table as a separate page."""
    style = "body{font:14px sans-serif}td{text-align:right}td,th{padding:2px 8px}caption{text-align:left}"
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text(caption(table))}</title><style>{style}</style></head>\n<body>{to_html(table)}</body></html>\n'
