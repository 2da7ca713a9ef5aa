"""What is composed once for many cells is what Hydra composes for each."""

from itertools import product

import pytest

from nmsweep.config.compose import Composer, _compose, _loader, _plain, asks_for_gpus, cells_of, prepare

VALUES = {
    "pattern": ("2:4", "8:16", "'50%'", "dense"),
    "mitigation": ("none", "shift+var", "[shift,var]"),
    "criterion": ("act", "rms"),
    "tasks": ("mini_science", "[mini_cloze,mini_prose]"),
}


@pytest.mark.parametrize(
    "extra",
    [(), ("eval.limit=null", "seed=3"), ("data.mirror='${results_dir}'",), ("model=tiny-llama", "model.seed=4")],
)
def test_a_shared_composition_is_hydras_own(extra: tuple[str, ...]) -> None:
    prepare(None)
    keys = ("pattern", "mitigation", "criterion", "tasks")
    jobs = [
        [*(f"{key}={value}" for key, value in zip(keys, values, strict=True)), *extra]
        for values in list(product(*(VALUES[key] for key in keys)))[::5]
    ]
    with _loader(None) as (loader, search):
        composer = Composer(loader, search)
        for job in jobs:
            assert composer.compose(job) == _plain(_compose(loader, search, job))


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (("hydra/launcher=submitit_slurm",), "cuda"),
        (("hydra/launcher=submitit_slurm", "device=cpu"), "cpu"),
        (("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null"), "auto"),
        (("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "+hydra.launcher.gpus_per_task=1"), "cuda"),
        (("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "+hydra.launcher.additional_parameters={gres: 'gpu:1'}"), "cuda"),
        (("hydra/launcher=submitit_local",), "auto"),
        (("hydra/launcher=joblib",), "auto"),
        (("hydra/launcher=ray",), "auto"),
        (("hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=1"), "cuda"),
        ((), "auto"),
    ],
)  # fmt: skip
def test_cells_of_jobs_that_ask_for_gpus_are_those_of_a_gpu(words: tuple[str, ...], device: str) -> None:
    swept = ("model=tiny-llama", "pattern=2:4,8:16")
    assert {cell.device for cell in cells_of([*swept, *words], multirun=True, config_dir=None)} == {device}
    (here,) = cells_of(["model=tiny-llama", *words], multirun=False, config_dir=None)  # no launcher runs it
    assert here.device == ("cpu" if device == "cpu" else "auto")


def test_jobs_of_ray_ask_for_gpus_themselves() -> None:
    assert asks_for_gpus({"ray": {"init": {"num_gpus": 0}, "remote": {"num_gpus": 1}}})
    assert not asks_for_gpus({"ray": {"init": {"num_gpus": 8}, "remote": {"num_gpus": 0}}})
