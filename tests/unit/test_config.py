import copy
from typing import Any

import pytest

from nmsweep.config.compose import cells_of
from nmsweep.config.defaults import defaults
from nmsweep.config.schema import RunConfig, parse_run
from nmsweep.errors import InputError


def one(*words: str) -> RunConfig:
    (cfg,) = cells_of(words, multirun=False, config_dir=None)
    return cfg


def messages(*words: str, multirun: bool = False) -> list[str]:
    with pytest.raises(InputError) as caught:
        cells_of(words, multirun=multirun, config_dir=None)
    return list(caught.value.messages)


def test_the_default_is_the_documented_cell() -> None:
    cfg = one()
    assert (cfg.model_name, str(cfg.pattern), cfg.criterion.name, cfg.mitigation, cfg.dtype) == (
        "smollm2",
        "8:16",
        "act",
        "none",
        "bfloat16",
    )
    assert cfg.tasks == ("mini_cloze", "mini_continuation", "mini_prose", "mini_science", "mini_yesno")


def test_hub_models_are_measured_on_the_papers_tasks() -> None:
    assert {"wikitext2", "piqa", "boolq"} <= set(one("model=llama").tasks)


@pytest.mark.parametrize("word", ["shift+var", "var+shift", "[shift,var]", "[var,shift]", "none+var+shift"])
def test_the_order_of_mitigations_does_not_matter(word: str) -> None:
    assert one(f"mitigation={word}").mitigation == "shift+var"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("pattern=0:4", "0:4"), ("pattern=5:4", "5:4"), ("pattern=8-16", "8-16"), ("pattern=150%", "150%"),
        ("model=smolm2", "did you mean smollm2"), ("criterion=actt", "did you mean act"), ("mitigation=shfit", "did you mean shift"),
        ("mitigation=var+var", "2 times"), ("patern=2:4", "did you mean pattern"), ("eval.limt=3", "did you mean eval.limit"),
        ("eval.limit=many", "eval.limit"), ("dtype=int8", "dtype"), ("scope=sometimes", "scope"), ("seed=-1", "seed"),
        ("mitigations.shift.stat=mode", None), ("model.path=/does/not/exist", "does not exist"), ("data.mirror=/does/not/exist", "no folder"),
        ("experiment=nope", "experiment"), ("status", "key=value"), ("pattern=2:4,8:16", "add -m"), ("mitigations.shft.stat=mean", "mitigations.shift"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(word: str, expected: str | None) -> None:
    if expected is None:
        return
    (message,) = messages(word)
    assert expected in message
    assert "\n" not in message


def test_all_mistakes_are_reported_together() -> None:
    found = messages("pattern=0:4", "model=smolm2", "mitigation=shfit", "patern=2:4", "eval.limit=many")
    assert len(found) == 5


def test_a_sweep_reports_each_mistake_once() -> None:
    assert len(messages("pattern=2:4,0:4", "mitigation=none,shift", multirun=True)) == 1


def test_dense_cells_of_a_grid_are_one_cell() -> None:
    cells = cells_of(["pattern=dense,8:16", "mitigation=none"], multirun=True, config_dir=None)
    assert cells[0].criterion is None
    assert cells[1].dense() == cells[0]


def test_an_experiment_is_a_union_of_grids() -> None:
    cells = cells_of(["experiment=demo"], multirun=False, config_dir=None)
    assert [(str(cell.pattern), cell.mitigation) for cell in cells] == [
        ("dense", "none"), ("2:4", "none"), ("4:8", "none"), ("8:16", "none"), ("16:32", "none"),
        ("8:16", "shift"), ("8:16", "var"), ("8:16", "shift+var"),
    ]  # fmt: skip


def raw() -> dict[str, Any]:
    return copy.deepcopy(
        {
            **defaults(), "model": {"name": "tiny"}, "pattern": "2:4", "criterion": {"name": "act", "_target_": "nmsweep.methods.criteria.act.Act"},
            "mitigation": "none", "mitigations": {}, "targets": "all", "tasks": "boolq", "eval": {}, "data": {}, "calibration": {},
        }
    )  # fmt: skip


def test_an_unquoted_pattern_in_yaml_is_repaired_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="quote it"):
        assert str(parse_run(raw() | {"pattern": 496}).pattern) == "8:16"


def test_a_target_outside_nmsweep_needs_to_be_listed_as_a_plugin() -> None:
    foreign = {"name": "x", "_target_": "os.system"}
    with pytest.raises(InputError, match="allowed: nmsweep"):
        parse_run(raw() | {"criterion": foreign})
    assert parse_run(raw() | {"criterion": foreign, "plugins": ["os"]}).criterion.target == "os.system"


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "a b"])
def test_names_never_become_paths(name: str) -> None:
    with pytest.raises(InputError):
        parse_run(raw() | {"model": {"name": name}})
    if name:
        with pytest.raises(InputError):
            parse_run(raw() | {"tasks": [name]})
