"""From the words of a command to typed cells: compose with Hydra, collect every mistake, write nothing."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmsweep.config.catalogue import options
from nmsweep.config.defaults import conf_dir
from nmsweep.config.schema import RunConfig, parse_run
from nmsweep.errors import InputError, nearest

HYDRA_KEYS = ("launcher", "sweeper.params", "sweeper.grids", "run.dir", "sweep.dir", "mode", "searchpath", "help")
"""Keys of Hydra's own node that have an effect: Hydra composes, but runs nothing."""


@dataclass(frozen=True)
class Command:
    """A composed command.

    Attributes:
        cells: its cells, in the order of its grid.
        launcher: the node `hydra.launcher`; empty for a command that is no sweep.
        log_dir: the folder for logs and for files of the launcher.
    """

    cells: list[RunConfig]
    launcher: Mapping[str, Any]
    log_dir: Path


def prepare(config_dir: Path | None) -> None:
    """Register the mitigations' parameters with Hydra, which cannot glob a folder itself; let our files win over plugins' entries."""
    Plugins.instance()  # fills the store
    store = ConfigStore.instance()
    for file in (conf_dir() / "hydra").glob("*/*.yaml"):
        store.repo.get("hydra", {}).get(file.parent.name, {}).pop(file.name, None)
    nodes = {name: dict(option.node) for name, option in options("mitigations", config_dir).items()}
    store.store(name="mitigation_parameters", node={"mitigations": nodes}, provider="nmsweep")


@contextlib.contextmanager
def _loader(config_dir: Path | None) -> Iterator[tuple[ConfigLoaderImpl, list[str]]]:
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        yield loader, search


def cells_of(words: Sequence[str], *, multirun: bool, config_dir: Path | None) -> list[RunConfig]:
    """Return the cells of a command; see `compose_command`."""
    return compose_command(words, multirun=multirun, config_dir=config_dir).cells


def compose_command(words: Sequence[str], *, multirun: bool, config_dir: Path | None) -> Command:
    """Compose a command.

    Args:
        words: overrides as typed, ``pattern=2:4,8:16``.
        multirun: whether comma-separated values are a sweep, as with ``-m``; an experiment may ask for it too
            (``hydra: {mode: MULTIRUN}``).
        config_dir: the user's own config folder.

    Raises:
        InputError: every mistake of the command, all together.
    """
    prepare(config_dir)
    with _loader(config_dir) as (loader, search):
        overrides, errors = _parse(words)
        overrides, unknown = _known(loader, search, overrides)
        errors += unknown
        base = _compose(loader, search, [o for o in overrides if not o.is_sweep_override()])
        swept = multirun or base.hydra.mode == RunMode.MULTIRUN
        if not swept:
            for override in [o for o in overrides if o.is_sweep_override()]:
                values = str(override.input_line).partition("=")[2]
                errors.append(f"{override.key_or_group}: {values} are several values; add -m to sweep over them")
                overrides.remove(override)
        launcher = _hydra_value(base, "launcher") if swept else {}
        gpus = asks_for_gpus(launcher)
        configs: list[RunConfig] = []
        composer = Composer(loader, search)
        for job in grid([str(o.input_line) for o in overrides], base.hydra.sweeper if swept else None):
            try:
                configs.append(_device_of_jobs(parse_run(composer.compose(job)), gpus))
            except InputError as error:
                errors += [message for message in error.messages if message not in errors]
        log_dir = Path(str(_hydra_value(base, "sweep.dir" if swept else "run.dir")))
    if errors:
        raise InputError(*errors)
    return Command(configs, launcher, log_dir)


def _hydra_value(base: DictConfig, key: str) -> Any:
    """Return a resolved value of Hydra's own node."""
    try:
        value = OmegaConf.select(base, f"hydra.{key}", throw_on_missing=True)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise InputError(f"hydra.{key}: {' '.join(str(error).split())}") from error


def asks_for_gpus(launcher: Any) -> bool:
    """Return whether a launcher's node requests GPUs: by submitit's keys, by sbatch's, or by those of Ray's jobs."""
    if not isinstance(launcher, Mapping):
        return False
    requests = {str(key).replace("-", "_"): value for key, value in launcher.items() if key != "init"}
    return (
        any(requests.get(key) not in (None, "", "0", 0) for key in _GPU_KEYS)
        or "gpu" in str(requests.get("gres"))
        or any(asks_for_gpus(node) for node in requests.values())
    )


_GPU_KEYS = ("gpus_per_node", "gpus_per_task", "gpus", "num_gpus")


def _device_of_jobs(cfg: RunConfig, gpus: bool) -> RunConfig:
    """Set ``device=auto`` to ``cuda`` if the jobs request GPUs: the submitting machine may have none."""
    return cfg.model_copy(update={"device": "cuda"}) if gpus and cfg.device == "auto" else cfg


class Composer:
    """Composes the configs of cells, with one call of Hydra's composition (80 ms) for each choice of groups.

    Hydra applies the overrides of values last, so they are applied to a copy by the same function.
    """

    def __init__(self, loader: ConfigLoaderImpl, search: list[str]) -> None:
        self._parser = OverridesParser.create()
        self._composed = cache(lambda lines: _compose(loader, search, lines))
        self._is_group = cache(lambda key: key.startswith("hydra") or bool(_options(loader, search, key)))

    def compose(self, job: Sequence[str]) -> dict[str, Any]:
        """Return the config of one cell's overrides.

        Raises:
            InputError: Hydra refuses them.
        """
        overrides = self._parser.parse_overrides(list(job))
        groups = tuple(str(o.input_line) for o in overrides if self._is_group(o.key_or_group))
        cfg = self._composed(groups).copy()
        with _one_message():
            values = [o for o in overrides if not self._is_group(o.key_or_group)]
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        return _plain(cfg)


def _parse(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    parser = OverridesParser.create()
    overrides, errors = [], []
    for word in words:
        try:
            overrides.append(parser.parse_override(word))
        except HydraException:
            errors.append(
                f"{word!r}: is neither a subcommand nor key=value; see `nmsweep --help`; quote values with spaces or brackets"
            )
    return overrides, errors


def _known(loader: ConfigLoaderImpl, search: list[str], overrides: list[Override]) -> tuple[list[Override], list[str]]:
    """Drop overrides of groups, options and keys that do not exist, with a message for each."""
    good, errors = [], []
    keys: list[Override] = []
    for override in overrides:
        group = override.key_or_group
        choices = _options(loader, search, group)
        if not choices or override.is_delete():
            keys.append(override)
            continue
        names = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
        bad = [name for name in names if name not in choices and name not in ("None", "null")]
        errors += [f"{group}: {name!r} is not known; {nearest(name, choices)}" for name in bad]
        if not bad:
            good.append(override)
    base = _compose(loader, search, [o for o in good if not o.is_sweep_override()])
    for override in keys:
        key = override.key_or_group
        if key.startswith("hydra"):
            if key.startswith("hydra/") or any(f"{key}.".startswith(f"hydra.{known}.") for known in HYDRA_KEYS):
                good.append(override)
            else:
                errors.append(
                    f"{key}: has no effect, as Hydra only composes; allowed: hydra.{', hydra.'.join(HYDRA_KEYS)}"
                )
        elif override.is_add() or override.is_force_add() or _exists(base, key):
            good.append(override)
        else:
            errors.append(f"{key}: is no key of the config; {nearest(key, _all_keys(base, loader))}")
    return [o for o in overrides if o in good], errors


def _options(loader: ConfigLoaderImpl, search: list[str], group: str) -> list[str]:
    """Return the options of a config group; none if it is no group."""
    return [] if group.startswith("hydra.") else loader.get_group_options(group, config_name="config", overrides=search)


def _exists(cfg: DictConfig, key: str) -> bool:
    node: Any = cfg
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return False
        node = node._get_node(part)
    return True


def _all_keys(cfg: DictConfig, loader: ConfigLoaderImpl) -> list[str]:
    keys: list[str] = list(loader.list_groups(""))

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            if prefix == "" and key == "hydra":
                continue
            name = f"{prefix}{key}"
            keys.append(name)
            child = node._get_node(key)
            if OmegaConf.is_dict(child) and not child._is_none() and not child._is_interpolation():
                walk(child, name + ".")

    walk(cfg, "")
    return [key for key in keys if not key.startswith("task_presets.")]


def _compose(loader: ConfigLoaderImpl, search: list[str], overrides: Sequence[Override | str]) -> DictConfig:
    lines = [o if isinstance(o, str) else str(o.input_line) for o in overrides]
    with _one_message(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return loader.load_configuration("config", [*search, *lines], run_mode=RunMode.RUN)


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Turn Hydra's errors about a config into an InputError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error


def grid(words: Sequence[str], sweeper: Any = None) -> list[list[str]]:
    """Return the overrides of each cell of a command, without duplicates.

    Args:
        words: overrides as typed; they win over the sweeper's.
        sweeper: Hydra's sweeper node: `params` is one grid, `grids` a list of grids whose union is swept.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parser = OverridesParser.create()
    typed = parser.parse_overrides(list(words))
    named = {override.key_or_group for override in typed}
    common = dict((sweeper or {}).get("params") or {})
    jobs: dict[tuple[str, ...], list[str]] = {}
    for axes in (sweeper or {}).get("grids") or [{}]:
        params = {key: value for key, value in {**common, **axes}.items() if key not in named}
        overrides = [*parser.parse_overrides([f"{key}={value}" for key, value in params.items()]), *typed]
        for batch in BasicSweeper.split_arguments(overrides, None):
            jobs.update({tuple(sorted(job)): list(job) for job in batch if tuple(sorted(job)) not in jobs})
    return list(jobs.values())


def _plain(cfg: DictConfig) -> dict[str, Any]:
    if cfg.profile not in cfg.profiles:
        raise InputError(f"profile: {cfg.profile!r} is not known; {nearest(str(cfg.profile), map(str, cfg.profiles))}")
    with _one_message():
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra", None)
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("experiment", None)
    return {str(key): value for key, value in plain.items()}
