"""The words of `nmsweep report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nmsweep.errors import InputError, nearest
from nmsweep.report.build import make_report
from nmsweep.report.numbers.check import check_results
from nmsweep.report.numbers.contrast import contrast, show_contrast
from nmsweep.report.show.formats import plain
from nmsweep.report.show.spec import TableSpec, parse_spec
from nmsweep.results.read import read_results

_WORDS = ("results_dir", "rows", "cols", "metric", "check", "compare")


@dataclass(frozen=True)
class Request:
    """What a command asks for: a report, a check or a comparison of two folders."""

    results_dir: Path = Path("results")
    table: TableSpec | None = None
    check: bool = False
    compare: tuple[Path, Path] | None = None


def parse_words(words: Sequence[str]) -> Request:
    """Read ``results_dir=DIR rows=… cols=… metric=…``, ``--check``, ``--compare A B``; ``report.`` may stand before a key.

    Raises:
        InputError: a word that is not understood, or a table that cannot be; all mistakes together.
    """
    rest, folders, errors = list(words), [], []
    if "--compare" in rest:
        at = rest.index("--compare")
        folders = [word for word in rest[at + 1 : at + 3] if "=" not in word]
        del rest[at : at + 1 + len(folders)]
        if len(folders) != 2:
            errors.append(f"--compare: {len(folders)} folders are named; name two, as in --compare A B")
    given = {}
    for word in rest:
        key, separator, value = word.removeprefix("--").removeprefix("report.").partition("=")
        key = key.replace("-", "_")
        if key == "check" and not separator:
            separator, value = "=", "true"
        if not separator or key not in _WORDS:
            errors.append(
                f"report: {word!r} is not understood; {nearest(key, [f'{name}=' for name in _WORDS])}, --check, --compare A B"
            )
        given[key] = value
    if "compare" in given:
        folders = given["compare"].split(",")
        if len(folders) != 2:
            errors.append(f"report.compare: {given['compare']!r} names {len(folders)} folders; allowed: compare=A,B")
    if given.get("check", "true").lower() not in ("true", "false"):
        errors.append(f"report.check: {given['check']!r}; allowed: true, false")
    table = _table(given, errors)
    if errors:
        raise InputError(*errors)
    compare = (Path(folders[0]), Path(folders[1])) if folders else None
    return Request(
        Path(given.get("results_dir", "results")), table, given.get("check", "false").lower() == "true", compare
    )


def _table(given: dict[str, str], errors: list[str]) -> TableSpec | None:
    if not {"rows", "cols", "metric"} & set(given):
        return None
    try:
        return parse_spec(given.get("rows", "pattern"), given.get("cols", "model"), given.get("metric", "drop"))
    except InputError as error:
        errors += error.messages
        return None


def main(words: Sequence[str]) -> int:
    """Run the subcommand; returns its exit code, 1 where a check finds a number that the samples do not give.

    Raises:
        InputError: a word that is not understood, or a folder without results.
    """
    asked = parse_words(words)
    out = Console()
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a pipe has no width of its own
    if asked.compare:
        show_contrast(out, contrast(*asked.compare), *asked.compare)
        return 0
    if asked.check:
        return check(asked.results_dir, out)
    make_report(asked.results_dir, asked.table, out)
    return 0


def check(results_dir: Path, out: Console) -> int:
    """Recompute every number and print what differs."""
    results = read_results(results_dir)
    found = check_results(results)
    for finding in found.wrong:
        where = " ".join(filter(None, (finding.cell_id, finding.task, finding.metric)))
        out.print(f"differs: {plain(where)}: {plain(finding.message)}", markup=False, highlight=False, soft_wrap=True)
    for finding in found.unknown:
        out.print(
            f"unchecked: {finding.cell_id} {plain(finding.task)} {plain(finding.metric)}: {finding.message}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for problem in results.problems:
        out.print(f"unreadable: {plain(problem)}", markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"{found.n_equal} numbers of {len(results.done)} cells are what their samples give; {len(found.wrong)} differ, {len(found.unknown)} cannot be recomputed",
        highlight=False,
        soft_wrap=True,
    )
    return int(bool(found.wrong or results.problems))
