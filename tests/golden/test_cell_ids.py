"""Cell ids stay what they were: records of earlier versions are found by them."""

import pytest

from nmsweep.cell import identity
from nmsweep.config.compose import cells_of

CELLS = [
    ("model=tiny-llama pattern=dense tasks=mini", "ceb1f078a2dc", "0eacd11ee5dc", ""),
    ("model=tiny-llama pattern=2:4 tasks=mini_science", "8c74d786cf2b", "0149a37f0a36", ""),
    (
        "model=tiny-qwen2 pattern=8:16 criterion=clact mitigation=shift+var tasks=mini dtype=fp32",
        "32eac0acc658",
        "cd05d7b71517",
        "",
    ),
    ("model=tiny-gemma3 pattern=50% criterion=wina tasks=mini_prose seed=3", "70f143fe9d85", "8a6d21e06db1", ""),
    (
        "model=tiny-llama pattern=threshold:50% mitigation=bias_static tasks=mini_science+mini_prose calibration.source=mini",
        "684607f35af3",
        "e2b0c4ca55da",
        "a62c9f420c18393f96c4",
    ),
    (
        "model=tiny-llama pattern=2:4 mitigation=scale_learned calibration.lr=0.01 calibration.epochs=2 tasks=mini_cloze",
        "5735ce2cad60",
        "e3b9a458a38f",
        "930afecdf702500a8e07",
    ),
    (
        "model=tiny-llama pattern=2:4 mitigation=rsparse mitigations.rsparse.rank=8 tasks=mini_yesno",
        "8e096f6b618c",
        "c7e61bde41d6",
        "a721ee63edb42df4b483",
    ),
    (
        "model=tiny-llama pattern=2:4 criterion=random criterion.seed=7 scope=skip_first:10% tasks=mini_science",
        "c8ccf52d09ea",
        "acdba7074d09",
        "",
    ),
    ("model=tiny-qwen2 pattern=2:4 profile=paper tasks=mini_prose eval.limit=4", "c7a18a7184c8", "74de5010c4f3", ""),
    (
        "model=tiny-qwen2 pattern=2:4 profile=paper_code targets=mlp tasks=mini_science eval.num_fewshot=3",
        "980af543e333",
        "81c58fd2c831",
        "",
    ),
    (
        "model=tiny-gemma3 pattern=2:4 policy=greedy allocation.patterns=1:4+2:4+3:4 tasks=mini_science",
        "742c8baa407f",
        "a0b5e2f32461",
        "9a65d15ade7f00d926c7",
    ),
    (
        "model=tiny-llama pattern=2:4 tasks=mini_science eval.apply_chat_template=true eval.scoring=stock eval.batch_tokens=64 results_dir=elsewhere",
        "28bece26bbae",
        "ef7229fdb5bd",
        "",
    ),
]
"""Command, and the cell_id, part_id and calibration_id that version 0.1.0 gave it, with the stand-in fingerprint below."""


@pytest.mark.parametrize(("command", "cell_id", "part_id", "calibration_id"), CELLS)
def test_ids_are_those_of_version_0_1_0(
    command: str, cell_id: str, part_id: str, calibration_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fingerprint of random weights depends on the version of transformers, by the defaults of its configs
    monkeypatch.setattr(identity, "fingerprint", lambda spec: f"weights of {spec.name}")
    (cfg,) = cells_of([*command.split(), "device=cpu"], multirun=False, config_dir=None)
    cell = identity.identify(cfg)
    assert (cell.cell_id, cell.part_id, cell.calibration_id) == (cell_id, part_id, calibration_id)
    assert cell.folder.name.endswith(f"_{cell_id}")
