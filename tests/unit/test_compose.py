"""What is composed once for many cells is what Hydra composes for each."""

from itertools import product

import pytest

from nmsweep.compose import Composer, _compose, _loader, _plain, prepare

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
