"""`nmsweep report`: write the tables, the figures and the page of a results folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from nmsweep.report.numbers.hardware import hardware_view
from nmsweep.report.numbers.layers import DATA as LAYERS
from nmsweep.report.numbers.layers import layer_tables, read_sensitivities
from nmsweep.report.numbers.scores import make_scores
from nmsweep.report.page.data import page_data
from nmsweep.report.page.manifest import cell_list, cell_provenance, manifest, warnings_of
from nmsweep.report.page.page import make_page
from nmsweep.report.show import formats
from nmsweep.report.show.figures import Figures, draw_figures
from nmsweep.report.show.spec import Table, TableSpec
from nmsweep.report.show.tables import make_tables, preset_tables
from nmsweep.report.show.terminal import show_results
from nmsweep.results.layout import REPORT, TIDY
from nmsweep.results.read import read_results
from nmsweep.results.storage import write_text
from nmsweep.results.tidy import write_csv
from nmsweep.statistics.identity import find_duplicates


def make_report(results_dir: Path, asked: TableSpec | None = None, out: Console | None = None) -> None:
    """Write `tidy.csv` and `report/` of a results folder, and print its main table.

    Args:
        results_dir: the results folder; a sweep may be writing to it.
        asked: a table besides the usual ones; it is printed.
        out: the console to print to.

    Raises:
        InputError: there is nothing to report.
    """
    out = out or Console()
    folder = results_dir / REPORT
    results = read_results(results_dir)
    write_csv(results_dir / TIDY, results.tidy)
    problems = list(results.problems)
    scores = make_scores(results, problems)
    custom = make_tables(asked, results, scores) if asked else []
    layers = read_sensitivities(results_dir, problems)
    tables = [*custom, *preset_tables(results, scores), *layer_tables(layers)]
    sources = manifest(results)
    problems += [*warnings_of(sources), *map(str, find_duplicates(cell_provenance(results)))]
    hardware = hardware_view(results, scores)
    cells = cell_list(results)
    write_csv(folder / "cells.csv", cells)
    write_text(folder / "manifest.json", json.dumps(sources, indent=1, ensure_ascii=False) + "\n")
    write_csv(folder / "hardware.csv", hardware)
    write_tables(folder / "tables", tables)
    show_results(out, results, scores)
    for table in custom:
        out.print(Markdown(formats.to_markdown(table)))
    show_problems(out, problems)
    figures = draw_figures(results, scores, layers, folder / "figures")
    data = page_data(results, scores, dict(zip(cells["cell_id"], cells["rerun"], strict=True)))
    page = make_page(results, scores, tables, figures, hardware, sources, data, problems)
    write_text(folder / "index.html", page)
    write_text(folder / "summary.md", summary(tables, figures, problems))
    for file in (results_dir / TIDY, folder / "summary.md", folder / "index.html"):
        out.print(str(file), soft_wrap=True, highlight=False)


def show_problems(out: Console, problems: Sequence[str]) -> None:
    """Print the first warnings."""
    for problem in problems[:20]:
        out.print(f"warning: {formats.plain(problem)}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > 20:
        out.print(f"… {len(problems) - 20} more warnings in summary.md", style="yellow", highlight=False)


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write each table in four formats, mini and real data in separate folders, and `all.tex`, which sets all of them."""
    inputs = {}
    for table in tables:
        place = folder / table.data
        name = f"{table.data}/{table.name}"
        inputs[name] = formats.to_latex(table, f"tab:{table.data}:{table.name}".replace("_", "-"))
        write_text(place / f"{table.name}.tex", inputs[name])
        write_text(place / f"{table.name}.md", formats.to_markdown(table))
        write_text(place / f"{table.name}.csv", formats.to_csv(table).to_csv(index=False))
        write_text(place / f"{table.name}.html", formats.html_document(table))
    if inputs:
        write_text(folder / "all.tex", formats.latex_document(inputs))


def summary(tables: Sequence[Table], figures: Figures, problems: Sequence[str]) -> str:
    """Return all tables as one Markdown file, warnings first."""
    parts = ["# Results\n", "Drops are dense − sparse, against the dense cell of the same model and settings; perplexity is given as a ratio and is never part of a mean.\n"]  # fmt: skip
    if problems:
        parts.append("## Warnings\n\n" + "".join(f"* {formats.markdown_text(problem)}\n" for problem in problems))
    for data, title in (
        ("real", "Published tasks"),
        ("mini", "Mini tasks (shipped; not comparable with published numbers)"),
        (LAYERS, "Layers (on a calibration text)"),
    ):
        of_data = [formats.to_markdown(table) for table in tables if table.data == data]
        if of_data:
            parts += [f"## {title}\n", *of_data]
    if figures.skipped:
        reasons = "".join(f"* {formats.markdown_text(reason)}\n" for reason in figures.skipped)
        parts.append("## Figures left out\n\n" + reasons)
    return "\n".join(parts)
