"""`nmsweep report`: its words and its exit code."""

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
    """A report, a check or a comparison of two folders."""

    results_dir: Path = Path("results")
    table: TableSpec | None = None
    check: bool = False
    compare: tuple[Path, Path] | None = None


def parse_words(words: Sequence[str]) -> Request:
    """Read ``results_dir=DIR rows=… cols=… metric=…``, ``--check``, ``--compare A B``; ``report.`` may precede a key.

    Raises:
        InputError: a word that is not known, or a table that cannot be made; all mistakes together.
    """
    rest, folders, errors = list(words), [], []
    if "--compare" in rest:
        at = rest.index("--compare")
        folders = [word for word in rest[at + 1 : at + 3] if "=" not in word]
        del rest[at : at + 1 + len(folders)]
        if len(folders) != 2:
            errors.append(f"--compare: {len(folders)} folders are named; name two, as in --compare A B")
    options = {}
    for word in rest:
        key, separator, value = word.removeprefix("--").removeprefix("report.").partition("=")
        key = key.replace("-", "_")
        if key == "check" and not separator:
            separator, value = "=", "true"
        if not separator or key not in _WORDS:
            allowed = nearest(key, [f"{name}=" for name in _WORDS])
            errors.append(f"report: {word!r} is not known; {allowed}, --check, --compare A B")
        options[key] = value
    if "compare" in options:
        folders = options["compare"].split(",")
        if len(folders) != 2:
            errors.append(f"report.compare: {options['compare']!r} names {len(folders)} folders; allowed: compare=A,B")
    check = options.get("check", "false").lower()
    if check not in ("true", "false"):
        errors.append(f"report.check: {options['check']!r}; allowed: true, false")
    table = _table(options, errors)
    if errors:
        raise InputError(*errors)
    compare = (Path(folders[0]), Path(folders[1])) if folders else None
    return Request(Path(options.get("results_dir", "results")), table, check == "true", compare)


def _table(options: dict[str, str], errors: list[str]) -> TableSpec | None:
    if not {"rows", "cols", "metric"} & set(options):
        return None
    try:
        return parse_spec(options.get("rows", "pattern"), options.get("cols", "model"), options.get("metric", "drop"))
    except InputError as error:
        errors += error.messages
        return None


def main(words: Sequence[str]) -> int:
    """Run the subcommand.

    Returns:
        The exit code: 1 where a check finds a number that differs from its samples, else 0.

    Raises:
        InputError: a word that is not known, or a folder without results.
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
