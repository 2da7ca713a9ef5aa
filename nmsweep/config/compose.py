"""From the words of a command to typed cells: compose with Hydra, find every mistake, write nothing."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmsweep.config.catalogue import options
from nmsweep.config.defaults import conf_dir
from nmsweep.config.schema import RunConfig, parse_run
from nmsweep.errors import InputError, nearest


def prepare(config_dir: Path | None) -> None:
    """Tell Hydra about the mitigations' parameters: a folder of files that it cannot glob by itself."""
    Plugins.instance()  # scan first, or a plugin's own entries win over ours
    store = ConfigStore.instance()
    for name in ("joblib", "submitit_local", "submitit_slurm"):  # ours are files in conf/hydra/launcher
        store.repo.get("hydra", {}).get("launcher", {}).pop(f"{name}.yaml", None)
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
    """The cells that a command asks for, in the order of its grid.

    Args:
        words: overrides as typed, ``pattern=2:4,8:16``.
        multirun: whether comma-separated values are a sweep.
        config_dir: the user's own config folder.

    Raises:
        InputError: every mistake of the command, all together.
    """
    prepare(config_dir)
    with _loader(config_dir) as (loader, search):
        overrides, errors = _parse(words)
        overrides, found = _known(loader, search, overrides)
        errors += found
        if not multirun:
            for override in [o for o in overrides if o.is_sweep_override()]:
                values = str(override.input_line).partition("=")[2]
                errors.append(f"{override.key_or_group}: {values} are several values; add -m to sweep over them")
                overrides.remove(override)
        base = _compose(loader, search, [o for o in overrides if not o.is_sweep_override()])
        swept = multirun or base.hydra.mode == RunMode.MULTIRUN
        gpus = swept and asks_for_gpus(OmegaConf.to_container(base.hydra.launcher))
        words = [str(override.input_line) for override in overrides]
        configs: list[RunConfig] = []
        composer = Composer(loader, search)
        for job in grid(words, base.hydra.sweeper if swept else None):
            try:
                configs.append(_on_what_jobs_have(parse_run(composer.compose(job)), gpus))
            except InputError as error:
                errors += [message for message in error.messages if message not in errors]
    if errors:
        raise InputError(*errors)
    return configs


def asks_for_gpus(launcher: Any) -> bool:
    """Whether a launcher's node asks its cluster for GPUs: submitit's keys, those of sbatch beside them, those of Ray's jobs."""
    if not isinstance(launcher, Mapping):
        return False
    asked = {str(key).replace("-", "_"): value for key, value in launcher.items() if key != "init"}
    return (
        any(asked.get(key) not in (None, "", "0", 0) for key in _GPU_KEYS)
        or "gpu" in str(asked.get("gres"))
        or any(asks_for_gpus(node) for node in asked.values())
    )


_GPU_KEYS = ("gpus_per_node", "gpus_per_task", "gpus", "num_gpus")


def _on_what_jobs_have(cfg: RunConfig, gpus: bool) -> RunConfig:
    """The cell with ``device=auto`` decided where its jobs will have GPUs: the machine that the command is given on may have none."""
    return cfg.model_copy(update={"device": "cuda"}) if gpus and cfg.device == "auto" else cfg


class Composer:
    """Cells' configs as plain values: what Hydra composes, but only once for each choice of groups.

    Hydra applies an override of a plain value last, to the composed config. So cells that differ in nothing else share a
    composition, which takes Hydra tens of milliseconds, and the value is set in a copy. A value that an interpolation may
    refer to is left to Hydra.
    """

    def __init__(self, loader: ConfigLoaderImpl, search: list[str]) -> None:
        self._loader, self._search = loader, search
        self._parser = OverridesParser.create()
        self._groups: dict[str, bool] = {}
        self._composed: dict[tuple[str, ...], tuple[dict[str, Any], set[str]]] = {}

    def compose(self, job: Sequence[str]) -> dict[str, Any]:
        """The config of one cell's overrides.

        Raises:
            InputError: Hydra refuses them.
        """
        overrides = self._parser.parse_overrides(list(job))
        plain = [override for override in overrides if self._is_plain(override)]
        rest = tuple(str(override.input_line) for override in overrides if override not in plain)
        if rest not in self._composed:
            composed = _compose(self._loader, self._search, rest)
            self._composed[rest] = _plain(composed.copy()), _referred(composed)
        base, referred = self._composed[rest]
        if any(override.key_or_group.split(".")[0] in referred for override in plain) or not all(
            _is_leaf(base, override.key_or_group) for override in plain
        ):
            return _plain(_compose(self._loader, self._search, job))
        cell = copy.deepcopy(base)
        for override in plain:
            *path, key = override.key_or_group.split(".")
            node = cell
            for part in path:
                node = node[part]
            node[key] = override.value()
        return cell

    def _is_plain(self, override: Override) -> bool:
        """Whether it sets a value of the config, and nothing else."""
        key, value = override.key_or_group, override.value()
        values = value if isinstance(value, list) else [value]
        return (
            override.type == OverrideType.CHANGE
            and override.package is None
            and not key.startswith("hydra")
            and all(part is None or isinstance(part, str | int | float | bool) for part in values)
            and not any("${" in part for part in values if isinstance(part, str))
            and not self._is_group(key)
        )

    def _is_group(self, key: str) -> bool:
        if key not in self._groups:
            self._groups[key] = bool(_options(self._loader, self._search, key))
        return self._groups[key]


_INTERPOLATION = re.compile(r"\$\{([A-Za-z_]\w*)[.}]")
_OTHER_INTERPOLATION = re.compile(r"\$\{(?![A-Za-z_]\w*[.}])")


def _is_leaf(config: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is there and holds a value, not a node."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return not isinstance(node, dict)


def _referred(cfg: DictConfig) -> set[str]:
    """The top-level keys that interpolations of a config may refer to."""
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(unresolved, dict)
    text = str({key: value for key, value in unresolved.items() if key != "hydra"})
    if _OTHER_INTERPOLATION.search(text):  # relative, nested or of a resolver: it may refer to anything
        return set(map(str, unresolved))
    return set(_INTERPOLATION.findall(text))


def is_multirun(words: Sequence[str], config_dir: Path | None) -> bool:
    """Whether an experiment asks for a sweep by itself (``hydra: {mode: MULTIRUN}``)."""
    prepare(config_dir)
    with _loader(config_dir) as (loader, search):
        overrides, errors = _parse(words)
        if errors:
            return False
        overrides, _ = _known(loader, search, overrides)
        try:
            base = _compose(loader, search, [o for o in overrides if not o.is_sweep_override()])
        except InputError:
            return False
    return bool(base.hydra.mode == RunMode.MULTIRUN)


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
    """Sort out overrides of groups, options and keys that do not exist; a message for each."""
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
        if override.is_add() or override.is_force_add() or key.startswith("hydra") or _exists(base, key):
            good.append(override)
        else:
            errors.append(f"{key}: is no key of the config; {nearest(key, _all_keys(base, loader))}")
    return [o for o in overrides if o in good], errors


def _options(loader: ConfigLoaderImpl, search: list[str], group: str) -> list[str]:
    """The options of a config group; none if it is no group."""
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return loader.load_configuration("config", [*search, *lines], run_mode=RunMode.RUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error


def grid(words: Sequence[str], sweeper: Any = None) -> list[list[str]]:
    """The overrides of each cell that a command asks for, without doubles.

    Args:
        words: overrides as typed; they win over the sweeper's.
        sweeper: Hydra's sweeper node; its `params` is one grid, its `grids` a list of grids whose union is swept.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parser = OverridesParser.create()
    typed = parser.parse_overrides(list(words))
    named = {override.key_or_group for override in typed}
    common = dict((sweeper or {}).get("params") or {})
    jobs: dict[tuple[str, ...], list[str]] = {}
    for one in (sweeper or {}).get("grids") or [{}]:
        params = {key: value for key, value in {**common, **one}.items() if key not in named}
        overrides = [*parser.parse_overrides([f"{key}={value}" for key, value in params.items()]), *typed]
        for batch in BasicSweeper.split_arguments(overrides, None):
            jobs.update({tuple(sorted(job)): list(job) for job in batch if tuple(sorted(job)) not in jobs})
    return list(jobs.values())


def _plain(cfg: DictConfig) -> dict[str, Any]:
    if cfg.profile not in cfg.profiles:
        raise InputError(f"profile: {cfg.profile!r} is not known; {nearest(str(cfg.profile), map(str, cfg.profiles))}")
    try:
        with contextlib.suppress(KeyError):
            OmegaConf.set_struct(cfg, False)
            cfg.pop("hydra")
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    plain.pop("experiment", None)
    return {str(key): value for key, value in plain.items()}
