"""`nmsweep bench`: which benchmark, on what, and where its table goes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nmsweep.errors import InputError, nearest

Words = dict[str, str]


def main(words: Sequence[str]) -> int:
    """Run ``nmsweep bench [kernel|forward|scoring|semistructured|sweep] [key=value …]``; 0 when it is done.

    Raises:
        InputError: a benchmark, key or value that does not exist; all mistakes of the values together.
    """
    if words and "=" not in words[0]:
        name, given = words[0], words[1:]
        if name not in BENCHMARKS:
            raise InputError(f"bench: {name!r} does not exist; {nearest(name, BENCHMARKS)}")
        chosen = [name]
    else:
        chosen, given = ["kernel", "forward"], words
    found = dict(_key_value(word) for word in given)
    allowed = {**COMMON, **{key: value for name in chosen for key, value in BENCHMARKS[name][1].items()}}
    if unknown := [key for key in found if key not in allowed]:
        raise InputError(
            *(f"bench {' '.join(chosen)}: {key}= is not known; {nearest(key, allowed)}" for key in unknown)
        )
    for name in chosen:
        function, defaults = BENCHMARKS[name]
        settings = {
            **COMMON,
            **defaults,
            **{key: value for key, value in found.items() if key in {**COMMON, **defaults}},
        }
        _write(name, function(Settings(settings)), settings)
    return 0


def _key_value(word: str) -> tuple[str, str]:
    key, separator, value = word.partition("=")
    if not separator:
        raise InputError(f"bench: {word!r} is not understood; write key=value")
    return key, value


class Settings:
    """The values of one benchmark, read as what they are; a wrong one is an `InputError`."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def __getitem__(self, key: str) -> str:
        return self.values[key]

    def number(self, key: str) -> int:
        """A whole number from 1 on."""
        text = self.values[key]
        if not text.isdigit() or int(text) < 1:
            raise InputError(f"bench: {key}={text}; a whole number from 1 on is needed")
        return int(text)

    def count(self, key: str) -> int:
        """A whole number from 0 on."""
        return 0 if self.values[key] == "0" else self.number(key)

    def names(self, key: str, known: Sequence[str] = ()) -> list[str]:
        """Words joined by commas."""
        words = [word for word in self.values[key].split(",") if word]
        wrong = [word for word in words if known and word not in known]
        if wrong or not words:
            raise InputError(f"bench: {key}={self.values[key]}; {nearest((wrong or [''])[0], known)}")
        return words

    def patterns(self) -> list[str]:
        """Patterns of exact counts."""
        from nmsweep.config.pattern import parse_pattern

        words = self.names("pattern")
        for word in words:
            if parse_pattern(word).kind not in ("n:m", "unstructured"):
                raise InputError(f"bench: pattern={word}; N:M such as 8:16 or p% is needed")
        return words

    @property
    def device(self) -> str:
        """Where to run, checked."""
        import torch

        given = self.values["device"]
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if given == "auto" else given
        if chosen.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"bench: device={given}, but there is no CUDA device here; pass device=cpu")
        if not chosen.startswith("cuda") and chosen != "cpu":
            raise InputError(f"bench: device={given}; allowed: auto, cpu, cuda, cuda:N")
        if chosen.startswith("cuda:"):
            number = chosen.partition(":")[2]
            if not number.isdigit() or int(number) >= torch.cuda.device_count():
                raise InputError(f"bench: device={given}; GPUs here: cuda:0 to cuda:{torch.cuda.device_count() - 1}")
            torch.cuda.set_device(int(number))  # events, memory and the name are those of the current one
        return chosen

    @property
    def dtype(self) -> Any:
        """The torch dtype."""
        import torch

        names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if self.values["dtype"] not in names:
            raise InputError(f"bench: dtype={self.values['dtype']}; {nearest(self.values['dtype'], names)}")
        return names[self.values["dtype"]]


def _kernel(given: Settings) -> list[dict[str, Any]]:
    from nmsweep.bench import kernel

    patterns, forms = given.patterns(), given.names("form", list(kernel.FORMS))
    hidden = given.number("hidden")
    _check_divides(patterns, hidden)
    return kernel.run(
        device=given.device, dtype=given.dtype, batch=given.number("batch"), seqlen=given.number("seqlen"),
        hidden=hidden, patterns=patterns, forms=forms, rounds=given.number("rounds"), repeats=given.number("repeats"),
    )  # fmt: skip


def _check_divides(patterns: Sequence[str], hidden: int) -> None:
    from nmsweep.config.pattern import parse_pattern

    if bad := [
        word for word in patterns if (parse_pattern(word).m or 1) > hidden or hidden % (parse_pattern(word).m or 1)
    ]:
        raise InputError(f"bench: hidden={hidden} is not a multiple of M of {', '.join(bad)}; choose another hidden")


def _forward(given: Settings) -> list[dict[str, Any]]:
    from nmsweep.bench import forward

    variants = _variants(given)
    device, rounds = given.device, given.number("rounds")
    batch, seqlen = given.number("batch"), given.number("seqlen")
    model = _model(given, device).model
    rows = forward.run(
        model, device=device, batch=batch, seqlen=seqlen, variants=variants, rounds=rounds, targets=given["targets"]
    )
    return [{"model": given["model"], "dtype": given["dtype"], **row} for row in rows]


def _variants(given: Settings) -> list[tuple[str, str, str]]:
    """(pattern, criterion, mitigation) as `variants` lists them, or every combination."""
    if not given["variants"]:
        patterns, criteria = given.patterns(), given.names("criterion")
        return [(p, c, m) for p in patterns for c in criteria for m in given.names("mitigation")]
    variants = []
    for word in given.names("variants"):
        pattern, _, rest = word.partition("/")
        criterion, _, mitigation = rest.partition("/")
        variants.append((pattern, criterion or "act", mitigation or "none"))
    return variants


def _model(given: Settings, device: str, *more: str) -> Any:
    from nmsweep.cell.identity import model_spec
    from nmsweep.config.compose import cells_of, prepare
    from nmsweep.models import load_model

    prepare(None)
    words = [f"model={given['model']}", f"dtype={given['dtype']}", *more]
    cfg = cells_of(words, multirun=False, config_dir=None)[0]
    return load_model(model_spec(cfg), dtype=cfg.dtype, device=device)


def _scoring(given: Settings) -> list[dict[str, Any]]:
    from nmsweep.bench import scoring
    from nmsweep.cell.identity import identify
    from nmsweep.config.compose import cells_of, prepare

    device = given.device
    prepare(None)
    words = [f"model={given['model']}", f"dtype={given['dtype']}", "pattern=dense", f"tasks={given['tasks']}"]
    if given["mirror"]:
        words.append(f"data.mirror={given['mirror']}")
    cell = identify(cells_of(words, multirun=False, config_dir=None)[0])
    loaded = _model(given, device)
    rows = scoring.run(
        loaded.model, loaded.tokenizer, [source for source in cell.sources if source.kind != "text"], device=device,
        limit=given.number("limit"), batch_tokens=given.number("batch_tokens"), rounds=given.number("rounds"),
        num_fewshot=given.count("shots"),
    )  # fmt: skip
    return [{"model": given["model"], "dtype": given["dtype"], **row} for row in rows]


def _semistructured(given: Settings) -> list[dict[str, Any]]:
    from nmsweep.bench import semistructured

    device = given.device
    if not device.startswith("cuda"):
        raise InputError("bench semistructured: it needs sparse tensor cores; run it on an NVIDIA GPU from Ampere on")
    return semistructured.run(
        device=device, dtype=given.dtype, tokens=given.number("tokens"), rounds=given.number("rounds")
    )


def _sweep(given: Settings) -> list[dict[str, Any]]:
    from nmsweep.bench import sweep

    return sweep.run(given.number("records"), given.number("rounds"))


def _write(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, str]) -> None:
    """Print a benchmark's table, and keep it as CSV and Markdown."""
    from nmsweep.bench.timing import machine

    device = Settings(settings).device
    table = pd.DataFrame(rows).assign(machine=machine(device), measured=time.strftime("%Y-%m-%d", time.gmtime()))
    command = " ".join(
        ["nmsweep bench", name, *(f"{key}={value}" for key, value in settings.items() if value and key != "out")]
    )
    shown = table.drop(columns=["machine", "measured"]).dropna(axis=1, how="all")
    text = "\n".join(
        [
            f"# bench {name}",
            "",
            f"`{command}`",
            "",
            f"{machine(device)}; ratios are medians of interleaved rounds.",
            "",
            "",
        ]
    )
    text += shown.to_markdown(index=False, floatfmt=".3f") + "\n"
    folder = Path(settings["out"])
    label = settings["label"] or "_".join(settings[key] for key in ("model", "dtype") if key in settings)
    stem = "_".join(part for part in (name, label, device.partition(":")[0]) if part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{stem}.csv", index=False, float_format="%.5g")
        (folder / f"{stem}.md").write_text(text)
    except OSError as error:
        raise InputError(f"bench: out={folder} cannot be written ({error.strerror}); name another folder") from error
    print(text)
    print(f"written to {folder / stem}.csv and .md")


Benchmark = Callable[[Settings], list[dict[str, Any]]]

COMMON: Words = {"device": "auto", "dtype": "bfloat16", "rounds": "7", "out": "results/bench", "label": ""}
BENCHMARKS: dict[str, tuple[Benchmark, Words]] = {
    "kernel": (
        _kernel,
        {
            "batch": "4", "seqlen": "256", "hidden": "4096", "pattern": "2:4,4:8,8:16,16:32,50%", "form": "act,weight,shift+var",
            "repeats": "20",
        },
    ),
    "forward": (
        _forward,
        {
            "model": "smollm2", "batch": "2", "seqlen": "512", "pattern": "2:4,8:16,16:32", "criterion": "act",
            "mitigation": "none,shift+var", "variants": "", "targets": "all",
        },
    ),
    "scoring": (
        _scoring,
        {"model": "smollm2", "tasks": "mini", "limit": "32", "batch_tokens": "4096", "mirror": "", "shots": "0"},
    ),
    "semistructured": (_semistructured, {"tokens": "8192"}),
    "sweep": (_sweep, {"records": "5000"}),
}  # fmt: skip
"""Benchmarks with the keys each knows and their defaults."""
