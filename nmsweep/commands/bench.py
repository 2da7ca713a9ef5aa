"""Run `nmsweep bench`: read the options of a benchmark, run it, and write its table."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from nmsweep.errors import InputError, nearest


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
    known = {key for name in names for key in BENCHMARKS[name]}
    if unknown := [key for key in typed if key not in known]:
        raise InputError(*(f"bench {' '.join(names)}: {key}= is not known; {nearest(key, known)}" for key in unknown))
    texts = {name: {key: typed.get(key, default) for key, (default, _) in BENCHMARKS[name].items()} for name in names}
    for name, values in {name: _values(name, texts[name]) for name in names}.items():
        run = import_module(f"nmsweep.bench.{name}").run
        rows = run(**{key: values[key] for key in inspect.signature(run).parameters})
        _write(name, list(rows), texts[name], values["device"])
    return 0


def _values(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Read the options of a benchmark.

    Raises:
        InputError: every value that cannot be read.
    """
    values, errors = {}, list[str]()
    for key, text in texts.items():
        try:
            values[key] = BENCHMARKS[name][key][1](key, text)
        except InputError as error:
            errors += error.messages
    if errors:
        raise InputError(*errors)
    return values


def _text(key: str, text: str) -> str:
    return text


def _count(key: str, text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise InputError(f"bench: {key}={text}; a whole number from {least} on is needed")
    return int(text)


def _number(key: str, text: str) -> int:
    return _count(key, text, least=1)


def _names(key: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise InputError(f"bench: {key}={text}; one or more names joined by commas are needed")
    return names


def _patterns(key: str, text: str) -> list[str]:
    """Read patterns that keep an exact number of channels."""
    from nmsweep.config.pattern import parse_pattern

    for name in (names := _names(key, text)):
        if parse_pattern(name).kind not in ("n:m", "unstructured"):
            raise InputError(f"bench: {key}={name}; N:M such as 8:16 or p% is needed")
    return names


def _dtype(key: str, text: str) -> str:
    if text not in (known := ("bfloat16", "float16", "float32")):
        raise InputError(f"bench: {key}={text}; {nearest(text, known)}")
    return text


def _device(key: str, text: str) -> str:
    """Read the device, and make it the current one: the events and the memory that are measured are those of it."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or device == "cuda:" or (kind == "cpu" and number):
        raise InputError(f"bench: {key}={text}; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"bench: {key}={text}, but there is no CUDA device here; pass device=cpu")
    if number and (not number.isdigit() or int(number) >= torch.cuda.device_count()):
        raise InputError(f"bench: {key}={text}; GPUs here: cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if number:
        torch.cuda.set_device(int(number))
    return device


def _write(name: str, rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str], device: str) -> None:
    """Print a benchmark's table, and write it as CSV and Markdown."""
    from nmsweep.bench.timing import machine

    table = pd.DataFrame(rows).assign(machine=machine(device), measured=time.strftime("%Y-%m-%d", time.gmtime()))
    words = [f"{key}={value}" for key, value in texts.items() if value and key != "out"]
    shown = table.drop(columns=["machine", "measured"]).dropna(axis=1, how="all")
    text = (
        f"# bench {name}\n\n`{' '.join(['nmsweep bench', name, *words])}`\n\n"
        f"{machine(device)}; ratios are medians of interleaved rounds.\n\n"
        f"{shown.to_markdown(index=False, floatfmt='.3f')}\n"
    )
    folder = Path(texts["out"])
    label = texts["label"] or "_".join(texts[key] for key in ("model", "dtype") if key in texts)
    stem = "_".join(part for part in (name, label, device.partition(":")[0]) if part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{stem}.csv", index=False, float_format="%.5g")
        (folder / f"{stem}.md").write_text(text)
    except OSError as error:
        raise InputError(f"bench: out={folder} cannot be written ({error.strerror}); name another folder") from error
    print(text)
    print(f"written to {folder / stem}.csv and .md")


Options = Mapping[str, tuple[str, Callable[[str, str], Any]]]
"""The default of each key, and what reads its value."""

_TIMED: Options = {
    "device": ("auto", _device), "dtype": ("bfloat16", _dtype), "rounds": ("7", _number),
    "out": ("results/bench", _text), "label": ("", _text),
}  # fmt: skip
_MODEL: Options = {"model": ("smollm2", _text)}

BENCHMARKS: Mapping[str, Options] = {
    "kernel": {
        **_TIMED, "batch": ("4", _number), "seqlen": ("256", _number), "hidden": ("4096", _number),
        "pattern": ("2:4,4:8,8:16,16:32,50%", _patterns), "form": ("act,weight,shift+var", _names), "repeats": ("20", _number),
    },
    "forward": {
        **_TIMED, **_MODEL, "batch": ("2", _number), "seqlen": ("512", _number), "pattern": ("2:4,8:16,16:32", _patterns),
        "criterion": ("act", _names), "mitigation": ("none,shift+var", _names), "variants": ("", _text),
        "targets": ("all", _text),
    },
    "scoring": {
        **_TIMED, **_MODEL, "tasks": ("mini", _text), "limit": ("32", _number), "batch_tokens": ("4096", _number),
        "mirror": ("", _text), "shots": ("0", _count),
    },
    "semistructured": {**_TIMED, "tokens": ("8192", _number)},
}  # fmt: skip
"""The keys of each benchmark."""
