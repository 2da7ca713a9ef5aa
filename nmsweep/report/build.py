"""`nmsweep report`: everything that a results folder can be shown as."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from nmsweep.report.numbers.hardware import hardware_view
from nmsweep.report.numbers.layers import DATA as LAYERS
from nmsweep.report.numbers.layers import Sensitivity, layer_tables, read_sensitivities
from nmsweep.report.numbers.samples import begin_reading
from nmsweep.report.numbers.scores import Scores, make_scores
from nmsweep.report.page.data import page_data
from nmsweep.report.page.manifest import cell_list, cell_provenance, manifest, warnings_of
from nmsweep.report.page.page import make_page, script_json
from nmsweep.report.show import formats
from nmsweep.report.show.figures import Figures, all_points, draw_figures
from nmsweep.report.show.spec import Table, TableSpec
from nmsweep.report.show.tables import make_tables, preset_tables
from nmsweep.report.show.terminal import show_results, show_table
from nmsweep.report.workers import collector_paused, workers
from nmsweep.results.layout import REPORT, SAMPLES, TIDY
from nmsweep.results.read import Results, read_results
from nmsweep.results.record import cell_folders
from nmsweep.results.storage import write_text
from nmsweep.results.tidy import write_csv
from nmsweep.statistics.identity import identical


@collector_paused()
def make_report(results_dir: Path, asked: TableSpec | None = None, out: Console | None = None) -> None:
    """Write `tidy.csv` and `report/` of a results folder, and print its main table.

    Args:
        results_dir: the results folder; a sweep may be writing to it.
        asked: a table that is wanted besides the usual ones; it is printed.
        out: where to print.

    Raises:
        InputError: there is nothing to report.
    """
    out = out or Console()
    folder = results_dir / REPORT
    places = cell_folders(results_dir)
    with workers(len(places)) as pool, ThreadPoolExecutor(1) as beside:
        # another process may not be up yet: this one reads the small files meanwhile
        begun = beside.submit(begin_reading, [place / SAMPLES for place in places], pool)
        results = read_results(results_dir)
        tidy = pool.submit(write_csv, results_dir / TIDY, results.tidy)
        problems = list(results.problems)
        scores = make_scores(results, problems, pool, lambda: begun.result()())
        figures = draw_figures(all_points(results, scores), folder / "figures", pool)
        tables = [*(make_tables(asked, results, scores) if asked else ()), *preset_tables(results, scores)]
        layers = read_sensitivities(results_dir, problems)
        tables += layer_tables(layers)
        made = manifest(results, scores.paired.n_resamples)
        problems += [*warnings_of(made), *map(str, identical(cell_provenance(results)))]
        view = hardware_view(results, scores)
        cells = cell_list(results)
        write_numbers(results, cells, tables, view, made)
        data = script_json(page_data(results, scores, dict(zip(cells["cell_id"], cells["rerun"], strict=True))))
        _show(out, results, scores, [table for table in tables if asked and table.spec == asked], problems)
        tidy.result()
        drawn = figures()  # all that needs none of them is done
        draw_layer_errors(layers, folder / "figures" / LAYERS, drawn)
    write_text(folder / "index.html", make_page(results, scores, tables, drawn, view, made, data, problems))
    write_text(folder / "summary.md", summary(tables, drawn, problems))
    for file in (results_dir / TIDY, folder / "summary.md", folder / "index.html"):
        out.print(str(file), soft_wrap=True, highlight=False)


def draw_layer_errors(layers: Sequence[Sensitivity], folder: Path, drawn: Figures) -> None:
    """The figure of the layers' errors, or why there is none."""
    if not layers:
        drawn.skipped.append("error (layers): no error by layer is recorded; `nmsweep sensitivity` measures it")
        return
    from nmsweep.report.show.layer_figure import (
        draw_layers,  # matplotlib, which most reports draw with in other processes
    )

    drawn.made.append(draw_layers(layers, folder))


def write_numbers(
    results: Results, cells: pd.DataFrame, tables: Sequence[Table], view: pd.DataFrame, made: Mapping[str, Any]
) -> None:
    """Every file that holds numbers or where they come from, but tidy.csv."""
    folder = results.folder / REPORT
    write_csv(folder / "cells.csv", cells)
    write_text(folder / "manifest.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    write_csv(folder / "hardware.csv", view)
    write_tables(folder / "tables", tables)


def _show(out: Console, results: Results, scores: Scores, asked: Sequence[Table], problems: Sequence[str]) -> None:
    show_results(out, results, scores)
    for table in asked:
        show_table(out, table)
    for problem in problems[:20]:
        out.print(f"warning: {formats.plain(problem)}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > 20:
        out.print(f"… {len(problems) - 20} more warnings in summary.md", style="yellow", highlight=False)


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Each table in four formats, apart for mini and real data; `all.tex` sets all of them."""
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
    """All tables in one Markdown file, problems first."""
    parts = ["# Results\n", "Drops are dense − sparse, against the dense cell of the same model and settings; perplexity is given as a ratio and is never part of a mean.\n"]  # fmt: skip
    if problems:
        parts.append("## Warnings\n\n" + "".join(f"* {formats.markdown_text(one)}\n" for one in problems))
    for data, title in (
        ("real", "Published tasks"),
        ("mini", "Mini tasks (shipped; not comparable with published numbers)"),
        (LAYERS, "Layers (on a calibration text)"),
    ):
        of_data = [formats.to_markdown(table) for table in tables if table.data == data]
        if of_data:
            parts += [f"## {title}\n", *of_data]
    if figures.skipped:
        parts.append(
            "## Figures left out\n\n" + "".join(f"* {formats.markdown_text(one)}\n" for one in figures.skipped)
        )
    return "\n".join(parts)
