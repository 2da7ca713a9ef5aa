"""Methods that cannot act, or not together: one message each, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest

CLI = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["mitigation=shift+shift_static"], ["shift and shift_static both set eta"]),
        (["mitigation=bias_static+bias_learned"], ["both set beta"]),
        (["mitigation=shift+shift"], ["shift is named 2 times"]),
        (["criterion=clact_static"], ["criterion: 'clact_static' is not known; did you mean clact", " rms,"]),
        (["mitigation=sparsegpt"], ["mitigation: 'sparsegpt' is not known"]),
        (["criterion=wanda", "mitigation=shift+var"], ["mitigation: shift+var corrects activations, but criterion wanda prunes weights"]),
        (["criterion=wt", "scope=skip_first:4"], ["scope: skip_first:4 chooses tokens"]),
        (["criterion=sparsegpt", "pattern=threshold:50%"], ["pattern: threshold:50% is of activations"]),
        (["pattern=dense", "mitigation=shift"], ["shift has no effect with pattern=dense"]),
        (["mitigation=rsparse", "mitigations.rsparse.rank=0"], ["rank 0"]),
        (["mitigation=shift", "mitigations.shift.stat=mode"], ["stat 'mode'; allowed: median, mean"]),
        (["scope=decode"], ["scope: decode is of generated text, but mini_cloze"]),
        (["scope=decode", "tasks=mini_prose"], ["scope: decode is of generated text, but mini_prose"]),
        (["scope=skip_first:0"], ["skip_first:0 leaves every token sparse"]),
        (["scope=skip_first:100%"], ["skip_first:100% leaves no token sparse"]),
        (["scope=skip_first:64", "tasks=mini_prose", "eval.seqlen=64"], ["nothing sparse in windows of 64 tokens"]),
        (["mitigation=scale_learned", "calibration.schedule=step", "pattern=threshold:50%"], ["calibration.schedule: step"]),
        (["mitigation=scale_learned", "calibration.objective=kl", "calibration.teacher=dense"], ["calibration.teacher: dense has no effect"]),
        (["criterion=rms", "calibration.source=nowhere"], ["calibration.source: 'nowhere' is no file"]),
        (["pattern=24:48"], ["not a multiple of 48"]),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(nmsweep: CLI, results: Path, words: list[str], messages: list[str]) -> None:
    code, _, said = nmsweep("model=tiny-llama", f"results_dir={results}", *words)
    assert code == 2, said
    assert all(message in said for message in messages), said
    assert not results.exists()


def test_calibrating_on_the_evaluated_text_is_refused(nmsweep: CLI, results: Path, tmp_path: Path) -> None:
    from nmsweep.data.tasks import MINI_FOLDER

    copy = tmp_path / "other.txt"
    copy.write_text("Something of its own before. " + (MINI_FOLDER / "prose.txt").read_text()[2000:3000])
    words = ["model=tiny-llama", f"results_dir={results}", "criterion=rms", "tasks=mini_prose"]
    code, _, said = nmsweep(*words, f"calibration.source={copy}")
    assert code == 2
    assert "has text in common with the evaluated task mini_prose" in said
    assert not results.exists()


def test_a_criterion_that_looks_ahead_is_refused_where_text_is_generated() -> None:
    from nmsweep.cell.check import _scope_errors
    from nmsweep.config.compose import cells_of
    from nmsweep.data.tasks import TaskSource

    source = TaskSource("writing", "harness", {"output_type": "generate_until"}, None, {}, "test")
    for words, n_errors in (
        ("criterion=clact", 1), ("criterion=clact scope=prefill", 0), ("criterion=clact_causal", 0), ("criterion=act scope=decode", 0),
        ("criterion=clact scope=decode", 1),
    ):  # fmt: skip
        [cfg] = cells_of(["model=tiny-llama", *words.split()], multirun=False, config_dir=None)
        assert len(_scope_errors(cfg, [source])) == n_errors, words
