"""The words of commands: ``key=value`` pairs, and those of a command that runs cells."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser

from nmsweep.errors import InputError
from nmsweep.sweep.plan import Plan, load, plan_ids


def key_values(words: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    """Read ``key=value`` words.

    Raises:
        InputError: a word is no pair, or its key is not allowed.
    """
    values = {}
    for word in words:
        key, separator, value = (
            word.lstrip("-").replace("-", "_").partition("=") if "=" not in word else word.partition("=")
        )
        if not separator or key not in allowed:
            raise InputError(f"{word!r}: is not understood here; allowed: {', '.join(f'{name}=…' for name in allowed)}")
        values[key] = value
    return values


def whole_number(values: dict[str, str], key: str, default: int) -> int:
    """Read a whole number from 0 on.

    Raises:
        InputError: the value is none.
    """
    value = values.get(key, str(default))
    if not value.isdecimal():
        raise InputError(f"{key}: {value!r} is no whole number; allowed: 0, 1, 2, …")
    return int(value)


def stored_plan(values: dict[str, str]) -> Plan:
    """Return the plan that ``results_dir=DIR plan=ID`` name; by default the latest of ``results``.

    Raises:
        InputError: there is none.
    """
    results_dir = Path(values.get("results_dir", "results"))
    ids = plan_ids(results_dir)
    if not ids and "plan" not in values:
        raise InputError(f"results_dir: {results_dir} has no plan of a sweep; run one first, or pass results_dir=DIR")
    return load(results_dir, values.get("plan", ids[0] if ids else ""))


@dataclass(frozen=True)
class CellWords:
    """The words of a command that runs cells.

    Attributes:
        overrides: ``key=value``, in Hydra's grammar.
        multirun: whether ``-m`` is among them.
        config_dir: the user's own config folder.
        for_hydra: whether they only ask Hydra to show something (``--cfg``, ``--help``, …).
    """

    overrides: tuple[str, ...]
    multirun: bool
    config_dir: Path | None
    for_hydra: bool


def parse_cell_words(words: Sequence[str]) -> CellWords:
    """Read the words of a command that runs cells, with Hydra's own parser.

    Raises:
        InputError: an option that is unknown, lacks its value, or has no effect; a config folder that does not exist.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        options, unknown = parser.parse_known_intermixed_args(list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 0:  # --version
            raise
        raise InputError(f"{shlex.join(words)}: {error}; see `nmsweep --help`") from error
    if unknown:
        raise InputError(f"{' '.join(unknown)}: no such option; see `nmsweep --help`")
    config_dir = Path(options.config_dir) if options.config_dir else None
    if config_dir and not config_dir.is_dir():
        raise InputError(f"--config-dir: {config_dir} is no folder; name one with criterion/, mitigations/, model/, …")
    for_hydra = any((options.help, options.hydra_help, options.info, options.cfg, options.shell_completion))
    if not for_hydra:
        for name, instead in _ONLY_FOR_HYDRA.items():
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')}: {instead}")
    return CellWords(tuple(options.overrides), options.multirun, config_dir, for_hydra)


_ONLY_FOR_HYDRA = {
    "config_path": "runs are composed from nmsweep's own config; add options of yours with --config-dir DIR",
    "config_name": "runs are composed from nmsweep's own config; choose a file with experiment=NAME",
    "experimental_rerun": "is not supported; `nmsweep retry` gives the words of the latest sweep again",
    "package": "goes with --cfg",
    "resolve": "goes with --cfg or --help",
}
"""Hydra's options that a run does not take, and what to use instead."""
