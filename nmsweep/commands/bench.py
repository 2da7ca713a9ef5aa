"""Run `nmsweep bench`: read the options of a benchmark, run it, and write its table."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nmsweep.config.schema import describe
from nmsweep.errors import InputError, nearest

BENCHMARKS = ("kernel", "forward", "scoring", "semistructured")
"""Modules of `nmsweep.bench` whose `run` times something."""


def main(words: Sequence[str]) -> int:
    """Run ``nmsweep bench [NAME] [key=value …]``; without a name, `kernel` and `forward`.

    Returns:
        0 when it is done.

    Raises:
        InputError: a benchmark, key or value that does not exist; all mistakes of the values together.
    """
    names, words = ([words[0]], words[1:]) if words and "=" not in words[0] else (["kernel", "forward"], words)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise InputError(f"bench: {unknown[0]!r} does not exist; {nearest(unknown[0], BENCHMARKS)}")
    if malformed := [word for word in words if "=" not in word]:
        raise InputError(*(f"bench: {word!r} is not understood; write key=value" for word in malformed))
    typed = {key: value for key, _, value in (word.partition("=") for word in words)}
    runs = {name: import_module(f"nmsweep.bench.{name}").run for name in names}
    options = {name: _options(run) for name, run in runs.items()}
    known = {key for allowed in options.values() for key in allowed.model_fields}
    if unknown := [key for key in typed if key not in known]:
        raise InputError(*(f"bench {' '.join(names)}: {key}= is not known; {nearest(key, known)}" for key in unknown))
    try:
        chosen = {name: allowed.model_validate(typed) for name, allowed in options.items()}
    except ValidationError as error:
        raise InputError(*map(describe, error.errors())) from error
    for name, run in runs.items():
        rows = run(**{key: getattr(chosen[name], key) for key in inspect.signature(run).parameters})
        _write(name, list(rows), chosen[name], typed)
    return 0


class _Common(BaseModel):
    """Options of every benchmark: the folder of its tables, and a word for the names of their files."""

    model_config = ConfigDict(validate_default=True)

    out: Path = Path("results/bench")
    label: str = ""


def _options(run: Callable[..., Any]) -> type[_Common]:
    """Return the options of a benchmark: the keyword arguments of its `run`, and those of all benchmarks."""
    fields: dict[str, Any] = {
        name: (argument.annotation, argument.default) for name, argument in inspect.signature(run).parameters.items()
    }
    return create_model("Options", __base__=_Common, **fields)


def _write(name: str, rows: Sequence[Mapping[str, Any]], options: Any, typed: Mapping[str, str]) -> None:
    """Print a benchmark's table, and write it as CSV and Markdown."""
    from nmsweep.bench.timing import machine

    device, folder = options.device, options.out
    table = pd.DataFrame(rows).assign(machine=machine(device), measured=time.strftime("%Y-%m-%d", time.gmtime()))
    words = [f"{key}={value}" for key, value in typed.items() if key in type(options).model_fields and key != "out"]
    shown = table.drop(columns=["machine", "measured"]).dropna(axis=1, how="all")
    text = (
        f"# bench {name}\n\n`{' '.join(['nmsweep bench', name, *words])}`\n\n"
        f"{machine(device)}; ratios are medians of interleaved rounds.\n\n"
        f"{shown.to_markdown(index=False, floatfmt='.3f')}\n"
    )
    label = options.label or "_".join(getattr(options, key) for key in ("model", "dtype") if hasattr(options, key))
    stem = "_".join(part for part in (name, label, device.partition(":")[0]) if part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{stem}.csv", index=False, float_format="%.5g")
        (folder / f"{stem}.md").write_text(text)
    except OSError as error:
        raise InputError(f"bench: out={folder} cannot be written ({error.strerror}); name another folder") from error
    print(text)
    print(f"written to {folder / stem}.csv and .md")
