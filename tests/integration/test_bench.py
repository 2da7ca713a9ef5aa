"""`nmsweep bench` writes its tables and refuses mistakes."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

Call = Callable[..., tuple[int, str, str]]


def test_a_kernel_benchmark_writes_ratios_with_their_machine(nmsweep: Call, tmp_path: Path) -> None:
    code, out, err = nmsweep(
        "bench", "kernel", "device=cpu", "batch=1", "seqlen=4", "hidden=64", "pattern=2:4,50%", "form=act,weight",
        "rounds=2", "repeats=1", f"out={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    table = pd.read_csv(tmp_path / "kernel_bfloat16_cpu.csv")
    assert list(zip(table.pattern, table.form, strict=True)) == [
        ("2:4", "act"),
        ("2:4", "weight"),
        ("50%", "act"),
        ("50%", "weight"),
    ]
    assert (table.ratio > 0).all()
    assert (table.ratio_q1 <= table.ratio).all()
    assert table.machine.str.contains("torch").all()
    text = (tmp_path / "kernel_bfloat16_cpu.md").read_text()
    assert "`nmsweep bench kernel device=cpu" in text
    assert text in out


def test_a_forward_benchmark_takes_a_list_of_variants_and_leaves_the_model_dense(nmsweep: Call, tmp_path: Path) -> None:
    code, _, err = nmsweep(
        "bench", "forward", "model=tiny-llama", "device=cpu", "batch=1", "seqlen=8", "variants=2:4/act/none,8:16/wina/shift+var",
        "rounds=2", f"out={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    table = pd.read_csv(tmp_path / "forward_tiny-llama_bfloat16_cpu.csv")
    assert list(table.criterion) == ["act", "wina"]
    assert list(table.mitigation.fillna("none")) == ["none", "shift+var"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernal"], "bench: 'kernal' does not exist; did you mean kernel?"),
        (["kernel", "patern=2:4"], "bench kernel: patern= is not known; did you mean pattern?"),
        (["kernel", "8:16"], "bench: '8:16' is not understood; write key=value"),
        (["kernel", "rounds=0"], "rounds: '0' is not valid; input should be greater than or equal to 1"),
        (["kernel", "pattern=3:5", "hidden=64"], "bench: hidden=64 is not a multiple of M of 3:5"),
        (
            ["kernel", "pattern=threshold:50%"],
            "threshold:50%: N:M such as 8:16 or p% is needed",
        ),
        (["kernel", "form=wight"], "bench: form=wight; did you mean weight or sequence_weight?"),
        (["kernel", "dtype=int8"], "dtype: 'int8' is not valid; input should be 'bfloat16', 'float16' or 'float32'"),
        (["forward", "device=tpu"], "device: 'tpu' is not valid; value error, allowed: auto, cpu, cuda, cuda:N"),
        (["semistructured", "device=cpu"], "bench semistructured: it needs sparse tensor cores"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    nmsweep: Call, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = nmsweep("bench", *words, f"out={tmp_path / 'out'}")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
