"""The contract holds for every method, each YAML by itself and all pairs of mitigations, on the three families."""

from functools import cache
from itertools import combinations

import pytest
import torch

from nmsweep.config.catalogue import find_method, options
from nmsweep.methods.base import Criterion, Mitigation
from nmsweep.methods.sparsification import build
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import sparsify
from nmsweep.testing import check_method

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")
CRITERIA, MITIGATIONS = tuple(options("criterion")), tuple(options("mitigations"))


@cache
def criterion(name: str) -> Criterion:
    method: Criterion = build(find_method("criterion", name, {}))
    return method


@cache
def mitigation(name: str) -> Mitigation:
    method: Mitigation = build(find_method("mitigations", name, {"rank": 4} if name == "rsparse" else {}))
    return method


PAIRS = [pair for pair in combinations(MITIGATIONS, 2) if mitigation(pair[0]).slot != mitigation(pair[1]).slot]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_keeps_the_contract(name: str, family: str) -> None:
    check_method(criterion(name), shape=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MITIGATIONS)
def test_every_mitigation_keeps_the_contract(name: str, family: str) -> None:
    check_method(mitigation(name), shape=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_of_mitigations_keeps_the_contract(pair: tuple[str, str], family: str) -> None:
    check_method(*map(mitigation, pair), shape=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["act", "clact", "wt"])
def test_every_channel_of_every_layer_is_counted(name: str, family: str) -> None:
    model = load_model(ModelSpec(name=family, source="tiny", shape=family), dtype="float32", device="cpu").model
    with torch.no_grad(), sparsify(model, pattern="1:4", criterion=name) as sparse:
        model(torch.arange(3, 21).reshape(2, 9))
        counts = sparse.counts()
    assert len(counts) == 7 * model.config.num_hidden_layers
    for layer in counts:
        assert layer.channels == (layer.out_features if name == "wt" else 18) * layer.in_features
