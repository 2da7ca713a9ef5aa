"""`nmsweep prefetch`: fetch a model and the data of tasks where there is a network, for machines that have none."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nmsweep.calibration.text import source_name
from nmsweep.cell.identity import model_spec
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig
from nmsweep.data.prefetch import Need, away, fill, needs, size
from nmsweep.errors import DataError, InputError, ModelError
from nmsweep.models import ModelSpec
from nmsweep.models.loading import fingerprint, local_folder, to_download


def main(words: Sequence[str]) -> int:
    """Print what is to be fetched with its size, fetch it, check it; 1 if something is still missing.

    Args:
        words: overrides of a run; those that count are `model`, `tasks`, `data.mirror`, `calibration.source`,
            `eval.num_fewshot`, `eval.include_path`.

    Raises:
        InputError: a model or task that does not exist, or tasks without a mirror to fill.
    """
    overrides = [word for word in words if not word.startswith("data.mirror=")]
    mirrors = [word.partition("=")[2] for word in words if word.startswith("data.mirror=")]
    mirror = Path(mirrors[-1]) if mirrors else None
    cfg = cells_of(["pattern=dense", *overrides], multirun=False, config_dir=None)[0]
    calibrated_on = source_name(cfg.calibration.source, cfg.tasks)
    wanted = needs(
        cfg.tasks, mirror or Path(), cfg.eval.num_fewshot, cfg.eval.include_path, calibrated_on == "wikitext2"
    )
    if wanted and mirror is None:
        tasks = ", ".join(dict.fromkeys(need.task for need in wanted))
        raise InputError(f"data.mirror: no folder is named for the data of {tasks}; add data.mirror=DIR")
    spec = model_spec(cfg)
    for line in _sizes(spec, wanted):
        print(line, flush=True)
    missing = _fetch_model(spec)
    if mirror is not None:
        missing += fill(wanted, mirror, lambda line: print(line, flush=True))
    for line in missing:
        print(f"missing: {line}")
    print(_last_line(cfg, mirror, missing))
    return int(bool(missing))


def _sizes(spec: ModelSpec, wanted: Sequence[Need]) -> Iterator[str]:
    """Yield a line for the model and each file of data, before anything is fetched."""
    yield f"model {spec.name}: {_model_size(spec)}"
    sizes: dict[str, str] = {}
    no_hub = away(wanted)
    for need in wanted:
        if need.state == "there":
            yield f"{need.task}/{need.file.name}: there"
            continue
        if need.hub_name not in sizes:
            sizes[need.hub_name] = "the hub cannot be reached" if no_hub and not need.is_local else _data_size(need)
        state = "damaged, to fetch again" if need.state == "damaged" else "to fetch"
        yield f"{need.task}/{need.file.name}: {state} from {need.hub_name} ({sizes[need.hub_name]})"


def _data_size(need: Need) -> str:
    try:
        n_bytes = size(need)
    except DataError:  # the reason is shown when it is fetched
        return "size unknown"
    return "size unknown" if n_bytes is None else f"{_megabytes(n_bytes)} for all its splits"


def _model_size(spec: ModelSpec) -> str:
    try:
        bytes_ = to_download(spec)
    except ModelError:
        return "to fetch (its source cannot be reached)"
    if bytes_ == 0:
        return "there"
    return "to fetch (size unknown)" if bytes_ is None else f"to fetch ({_megabytes(bytes_)})"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _fetch_model(spec: ModelSpec) -> list[str]:
    """Fetch and check the model's files; return the error, if any, as one line."""
    if spec.source == "tiny":
        return []
    try:
        local_folder(spec, lambda line: print(f"  {line}", flush=True))
        print(f"  model {spec.name}: sha256 {fingerprint(spec)[:12]}… of its content", flush=True)
    except ModelError as error:
        return [str(error)]
    return []


def _last_line(cfg: RunConfig, mirror: Path | None, missing: Sequence[str]) -> str:
    if missing:
        return f"{len(missing)} missing; run the same command where there is a network: it goes on from here"
    where = f" data.mirror={mirror}" if mirror else ""
    return f"all there: nmsweep model={cfg.model_name} tasks={'+'.join(cfg.tasks)}{where} needs no network"
