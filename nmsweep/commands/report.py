"""`nmsweep report`: its words and its exit code."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nmsweep.commands.words import key_values
from nmsweep.errors import InputError
from nmsweep.report.build import make_report
from nmsweep.report.numbers.check import check_results
from nmsweep.report.numbers.contrast import contrast, show_contrast
from nmsweep.report.show.formats import plain
from nmsweep.report.show.spec import TableSpec, parse_spec
from nmsweep.results.read import read_results


def parse_words(words: Sequence[str]) -> tuple[argparse.Namespace, Path, TableSpec | None]:
    """Read ``results_dir=DIR rows=… cols=… metric=…``, ``--check``, ``--compare A B``; ``report.`` may precede a key.

    Returns:
        The options `check` and `compare`, the results folder, and the table of the user's own if there is one.

    Raises:
        InputError: a word that is not known, or a table that cannot be made.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compare", nargs=2, type=Path)
    try:
        options, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise InputError(f"report: {error}; allowed: --check, --compare A B") from error
    values = key_values([word.removeprefix("report.") for word in rest], ("results_dir", "rows", "cols", "metric"))
    results_dir = Path(values.pop("results_dir", "results"))
    table = {"rows": "pattern", "cols": "model", "metric": "drop"} | values
    return options, results_dir, parse_spec(**table) if values else None


def main(words: Sequence[str]) -> int:
    """Run the subcommand.

    Returns:
        The exit code: 1 where a check finds a number that differs from its samples, else 0.

    Raises:
        InputError: a word that is not known, or a folder without results.
    """
    options, results_dir, table = parse_words(words)
    out = Console()
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a pipe has no width of its own
    if options.compare:
        show_contrast(out, contrast(*options.compare), *options.compare)
        return 0
    if options.check:
        return check(results_dir, out)
    make_report(results_dir, table, out)
    return 0


def check(results_dir: Path, out: Console) -> int:
    """Recompute every number and print those that differ; returns the exit code."""
    results = read_results(results_dir)
    checked = check_results(results)
    lines = [
        f"{word}: {' '.join(filter(None, (finding.cell_id, finding.task, finding.metric)))}: {finding.message}"
        for word, findings in (("differs", checked.wrong), ("unchecked", checked.unknown))
        for finding in findings
    ]
    lines += [f"unreadable: {problem}" for problem in results.problems]
    lines.append(
        f"{checked.n_equal} numbers of {len(results.done)} cells are what their samples give; "
        f"{len(checked.wrong)} differ, {len(checked.unknown)} cannot be recomputed"
    )
    for line in lines:
        out.print(plain(line), markup=False, highlight=False, soft_wrap=True)
    return int(bool(checked.wrong or results.problems))
