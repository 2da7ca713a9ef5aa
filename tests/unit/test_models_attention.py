"""The workaround for torch's attention kernel changes no number where the kernel is right."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nmsweep.models import ModelSpec, load_model
from nmsweep.models.attention import sdpa, with_another_query


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 33])
def test_another_query_changes_nothing(queries: int, key_heads: int, boolean: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, key_heads, 33, 8, dtype=torch.float64, generator=generator)
    sees = torch.ones(queries, 33, dtype=torch.bool).tril(33 - queries).expand(2, 1, -1, -1)
    mask = sees if boolean else torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    plain, _ = sdpa_attention_forward(layer, query, key, value, mask)
    found, _ = sdpa_attention_forward(layer, *with_another_query(query, key, value, mask))
    assert found.shape[1] == queries + 1
    torch.testing.assert_close(found[:, :-1], plain, rtol=0, atol=1e-14)


def test_a_loaded_model_attends_through_it() -> None:
    load_model(ModelSpec(name="tiny", source="tiny", shape="tiny-llama"), dtype="float32", device="cpu")
    assert AttentionInterface()["sdpa"] is sdpa
