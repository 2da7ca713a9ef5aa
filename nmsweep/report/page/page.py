"""One self-contained HTML page: it fetches nothing, and every word of a record is escaped."""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from nmsweep.report.numbers.hardware import COLUMNS
from nmsweep.report.numbers.quantities import QUANTITIES
from nmsweep.report.numbers.scores import Scores, by_cell
from nmsweep.report.show.figures import Figures
from nmsweep.report.show.formats import caption, html_text, number, plain, span, to_html
from nmsweep.report.show.spec import Table, in_order
from nmsweep.results.read import Results
from nmsweep.statistics.intervals import N_RESAMPLES

_TEMPLATE = Path(__file__).parent / "template"


def make_page(
    results: Results,
    scores: Scores,
    tables: Sequence[Table],
    figures: Figures,
    hardware: pd.DataFrame,
    sources: Mapping[str, Any],
    data: Mapping[str, Any],
    warnings: Sequence[str],
) -> str:
    """Return the page as text.

    Args:
        results: the records.
        scores: their numbers.
        tables: shown below the cells, each folded.
        figures: whose PNG files the page contains.
        hardware: from `hardware_view`.
        sources: from `manifest`.
        data: from `page_data`.
        warnings: shown at the top.
    """
    environment = Environment(loader=FileSystemLoader(_TEMPLATE), autoescape=True)
    status = results.cells["status"]
    return environment.get_template("page.html.jinja").render(
        css=Markup((_TEMPLATE / "page.css").read_text(encoding="utf-8")),
        js=Markup((_TEMPLATE / "page.js").read_text(encoding="utf-8")),
        data=Markup(script_json(data)),
        title=plain(results.folder),
        n_done=int((status == "done").sum()),
        n_failed=int((status == "failed").sum()),
        n_models=results.cells["model"].nunique(),
        n_resamples=f"{N_RESAMPLES:,}",
        warnings=[plain(warning) for warning in warnings],
        summary=summary_blocks(results, scores),
        tables=[{"title": caption(table), "html": Markup(to_html(table))} for table in tables],
        figures=[
            {"title": f"{figure.title}, {figure.data} tasks", "note": figure.note, "source": _inline(figure.files), "files": _names(figure.files)}
            for figure in figures.drawn
        ],
        skipped=figures.skipped,
        hardware=Markup(hardware_html(hardware)),
        provenance=provenance_blocks(sources),
    )  # fmt: skip


def script_json(value: Any) -> str:
    """Return JSON that is safe in a script element: no character can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _inline(files: Iterable[Path]) -> str:
    image = next(file for file in files if file.suffix == ".png")
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def _names(files: Iterable[Path]) -> str:
    return ", ".join(str(Path(*file.parts[-3:])) for file in files)


def summary_blocks(results: Results, scores: Scores) -> list[dict[str, Any]]:
    """Return the cell with the smallest drop and ratio of each model and pattern, for each kind of data."""
    blocks = []
    for data, title in (("real", "Published tasks"), ("mini", "Mini tasks (not comparable with published numbers)")):
        cells = by_cell(results, scores, data)
        for quantity in (QUANTITIES["drop"], QUANTITIES["ratio"]):
            name = quantity.name
            known = cells[cells[name].notna()]
            if not len(known):
                continue
            best = in_order(known.loc[known.groupby(["model", "pattern"], sort=False)[name].idxmin()])
            rows = [
                [plain(row["model"]), row["pattern"], row["criterion"], row["mitigation"], number(row[name], quantity),
                 span(row[f"{name}_low"], row[f"{name}_high"], quantity), cell_id]
                for cell_id, row in best.iterrows()
            ]  # fmt: skip
            columns = ["model", "pattern", "criterion", "mitigation", quantity.title, "95 % interval", "cell"]
            blocks.append({"title": f"{title}: {quantity.title}", "columns": columns, "rows": rows})
    return blocks


def hardware_html(view: pd.DataFrame) -> str:
    """Return the hardware view as a table element; the measured columns are the last ones."""
    if not len(view):
        return "<p>No cell with pruned activations.</p>"
    table = view.astype(object).map(_shown).rename(columns=lambda name: html_text(COLUMNS.get(name, name)))
    return table.to_html(index=False, escape=False, border=0, classes="numbers")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return html_text(value)


def provenance_blocks(sources: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifest as tables of values and numbers of cells."""
    flat = [("git", sources["git"]), ("device", sources["device"]), ("record schema", sources["schema"])]
    flat += [(f"version of {package}", versions) for package, versions in sources["versions"].items()]
    rows = [[name, value or "–", n] for name, values in flat for value, n in values.items()]
    named = [[kind, plain(name), value, n] for kind in ("models", "tasks") for name, values in sources[kind].items() for value, n in values.items()]  # fmt: skip
    return [
        {"title": "Software and devices", "columns": ["name", "value", "cells"], "rows": rows},
        {"title": "Models and data", "columns": ["kind", "name", "fingerprint and version", "cells"], "rows": named},
    ]
