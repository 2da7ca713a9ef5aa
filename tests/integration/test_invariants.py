"""What holds for every method, each YAML by itself and all pairs of mitigations, on the three families."""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nmsweep.calibration import Calibrated, fit
from nmsweep.config.catalogue import options
from nmsweep.config.schema import CalibrationConfig
from nmsweep.methods.base import Mitigation
from nmsweep.methods.sparsification import Sparsification, build
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import assemble
from nmsweep.sparsity.install import install

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")
CRITERIA, MITIGATIONS = tuple(options("criterion")), tuple(options("mitigations"))
WEIGHTS = ("wt", "wanda", "sparsegpt")
INEXACT = {"larosa", "rsparse", "scale_learned", "bias_learned", "bias_static"}
"""A rotation, and what is added to the product in fp32: M:M equals the dense layer up to rounding only."""


def slot(mitigation: str) -> str:
    from nmsweep.config.catalogue import find_method

    made = build(find_method("mitigations", mitigation, {}))
    assert isinstance(made, Mitigation)
    return made.slot


PAIRS = ["+".join(pair) for pair in combinations(MITIGATIONS, 2) if slot(pair[0]) != slot(pair[1])]
METHODS = [(name, "none") for name in CRITERIA] + [("act", name) for name in (*MITIGATIONS, *PAIRS)]

EXACT = [(c, m) for c, m in METHODS if not INEXACT & set(m.split("+")) and c != "sparsegpt"]


@cache
def model_of(family: str, dtype: str) -> Any:
    return load_model(ModelSpec(name=family, source="tiny", shape=family), dtype=dtype, device="cpu").model


def text(n: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def calibrated(family: str, dtype: str, made: Sparsification) -> Mapping[str, Any]:
    if not made.calibrated:
        return {}
    found: Calibrated = fit(model_of(family, dtype), text(2, 12, 1), made, settings=CalibrationConfig())
    return found.state


@pytest.fixture(autouse=True)
def _dense_again_and_no_random_numbers() -> Iterator[None]:
    """Every test leaves the models' modules and weights, and the global random state, as they were."""
    before = {family: dict(model_of(family, "float64").named_modules()) for family in FAMILIES}
    weights = {
        family: {k: v.clone() for k, v in model_of(family, "float64").state_dict().items()} for family in FAMILIES
    }
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)
    for family in FAMILIES:
        now = dict(model_of(family, "float64").named_modules())
        assert now.keys() == before[family].keys()
        assert all(now[name] is module for name, module in before[family].items())
        for name, value in model_of(family, "float64").state_dict().items():
            assert torch.equal(value, weights[family][name]), name


def logits(model: Any, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if padding is None else (~padding).long()
    place = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("criterion", "mitigation"), METHODS)
def test_a_sequence_is_pruned_by_itself(criterion: str, mitigation: str, family: str) -> None:
    """In float64 batch mates, padding and a second pass change nothing; and exactly N of each M are kept."""
    made, targets = assemble("1:4", criterion, mitigation, "all", {"rsparse": {"rank": 4}})
    model, state = model_of(family, "float64"), calibrated(family, "float64", made)
    ids, other = text(1, 9), text(1, 13, 2)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    padding = torch.arange(13)[None] < torch.tensor([[4], [0]])
    with install(model, made, targets, state) as sparse:
        alone = logits(model, ids)
        counts = sparse.counts()
        assert torch.equal(alone, logits(model, ids))
        beside = logits(model, torch.cat([padded, other]), padding)
    torch.testing.assert_close(beside[0, 4:], alone[0], rtol=0, atol=1e-9)
    assert len(counts) == 7 * model.config.num_hidden_layers
    for layer in counts:
        tokens = layer.out_features if criterion in WEIGHTS else ids.numel()
        assert layer.channels == tokens * layer.in_features
        assert layer.kept * 4 == layer.channels, layer.layer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("criterion", "mitigation"), EXACT)
def test_nothing_pruned_is_the_dense_model(criterion: str, mitigation: str, family: str) -> None:
    """M:M with bfloat16: bit for bit, biases included; dtype kept. A low rank, a rotation and what is fitted: exempt."""
    made, targets = assemble("4:4", criterion, mitigation, "all", {})
    model = model_of(family, "bfloat16")
    state = calibrated(family, "bfloat16", made)
    with install(model, made, targets, state):
        sparse = logits(model, text(2, 9))
    assert torch.equal(sparse, logits(model, text(2, 9)))
    assert sparse.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mitigation", sorted(INEXACT))
def test_nothing_pruned_is_the_dense_model_up_to_rounding(mitigation: str, family: str) -> None:
    made, targets = assemble("4:4", "act", mitigation, "all", {})
    model = model_of(family, "float64")
    state = calibrated(family, "float64", made)
    with install(model, made, targets, state):
        sparse = logits(model, text(2, 9))
    torch.testing.assert_close(
        sparse, logits(model, text(2, 9)), rtol=0, atol=1e-6 if "learned" not in mitigation else 2e-2
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_dense_again_after_an_error(family: str) -> None:
    for criterion in ("act", "wt"):
        made, targets = assemble("2:4", criterion, "none", "all", {})
        with pytest.raises(KeyError), install(model_of(family, "float64"), made, targets):
            raise KeyError
    made, targets = assemble("2:4", "rms", "none", "all", {})
    with pytest.raises(RuntimeError, match="stop"):
        fit(model_of(family, "float64"), text(2, 12), made, targets, step=_stop)


def _stop() -> None:
    raise RuntimeError("stop")
