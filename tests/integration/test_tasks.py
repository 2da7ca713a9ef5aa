"""Tasks beyond the shipped ones: generation, few-shot, chat, groups, the user's own YAML; from local files."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from nmsweep.cell.identity import task_identity, task_sources
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import EvalConfig
from nmsweep.data import requirements
from nmsweep.data.tasks import MINI_FOLDER, find_task
from nmsweep.evaluate import harness
from nmsweep.evaluate.task import harness_task
from nmsweep.models.tiny import tiny_model, tiny_tokenizer
from nmsweep.results.record import cell_folders, read_cell
from nmsweep.statistics.comparison import compare

Call = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny-llama", "dtype=float64", "device=cpu")
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(n: int, start: int = 1) -> list[dict[str, str]]:
    return [
        {"question": f"Ann has {i} nuts and finds {i + 2}. How many?", "answer": f"{i} + {i + 2}.\n#### {2 * i + 2}"}
        for i in range(start, start + n)
    ]


@pytest.fixture
def mirror_of_sums(tmp_path: Path) -> Path:
    write_lines(tmp_path / "mirror" / "gsm8k" / "test.jsonl", sums(3, 50))
    write_lines(tmp_path / "mirror" / "gsm8k" / "train.jsonl", sums(8))
    return tmp_path / "mirror"


@pytest.fixture
def science(tmp_path: Path) -> Path:
    """Write a folder of task YAMLs over local files: two tasks, and groups that list them by name and by tag."""
    rows = [json.loads(line) for line in (MINI_FOLDER / "science.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "data" / "examples.jsonl", rows[:8])
    folder = tmp_path / "yamls"
    folder.mkdir()
    for name, part in (("sky", rows[8:20]), ("earth", rows[20:27])):
        write_lines(tmp_path / "data" / f"{name}.jsonl", part)
        config = {
            "task": f"own_{name}", "tag": "own_science_tasks", "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {
                "train": str(tmp_path / "data" / "examples.jsonl"), "test": str(tmp_path / "data" / f"{name}.jsonl"),
            }},
            "training_split": "train", "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "metadata": {"version": 1.0},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    group = {
        "group": "own_science", "task": ["own_science_tasks"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}], "metadata": {"version": 2},
    }  # fmt: skip
    (folder / "_group.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a YAML; None removes one."""
    config = {**yaml.safe_load(file.read_text()), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}, sort_keys=False))


def responses(results: Path) -> dict[str, list[str]]:
    """Return the generated text of each item, by scope; the dense text by its pattern's name."""
    found = {}
    for record in map(read_cell, cell_folders(results)):
        first = record.metrics.iloc[0]
        name = "dense" if first["pattern"] == "dense" else str(first["scope"])
        found[name] = record.samples["response"].tolist()
    return found


def test_gsm8k_is_generated_under_every_scope(nmsweep: Call, results: Path, mirror_of_sums: Path) -> None:
    words = (*TINY, "tasks=gsm8k", f"data.mirror={mirror_of_sums}", f"results_dir={results}", "pattern=2:4")
    code, _, err = nmsweep("-m", *words, "scope=all,prefill,decode", "eval.limit=2")
    assert code == 0, err
    found = responses(results)
    assert len({tuple(texts) for texts in found.values()}) == 4
    assert found["decode"][0][:1] == found["dense"][0][:1], "the first token comes of the dense prompt"
    record = next(r for r in map(read_cell, cell_folders(results)) if r.metrics["pattern"].iloc[0] == "2:4")
    assert set(record.metrics["metric"]) == {"exact_match:flexible-extract", "exact_match:strict-match"}
    assert record.metrics["n_items"].tolist() == [2, 2]
    for metric in ("exact_match:flexible-extract", "exact_match:strict-match"):
        (value,) = record.metrics[record.metrics["metric"] == metric]["value"]
        assert value == record.samples[f"metric_{metric}"].mean()


def test_an_answer_that_is_right_counts(mirror_of_sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("tiny-llama", 0, torch.float64, torch.device("cpu")), tiny_tokenizer("tiny-llama")
    answers = iter([sums(3, 50)[0]["answer"], "It must be 104", "no idea"])
    monkeypatch.setattr(harness.NMSweepLM, "generate_until", lambda self, requests: [next(answers) for _ in requests])
    source = find_task("gsm8k", mirror_of_sums)
    result = harness.measure(model, tokenizer, source, EvalConfig(num_fewshot=5, batch_tokens=512))
    values = {metric.metric: metric.value for metric in result.metrics}
    assert values == pytest.approx({"exact_match:flexible-extract": 2 / 3, "exact_match:strict-match": 1 / 3})
    assert result.samples["response"].tolist()[1] == "It must be 104"


def test_examples_never_come_from_the_evaluated_split(nmsweep: Call, results: Path, mirror_of_sums: Path) -> None:
    (mirror_of_sums / "gsm8k" / "train.jsonl").unlink()
    words = (*TINY, "tasks=gsm8k", f"data.mirror={mirror_of_sums}", f"results_dir={results}", "pattern=2:4")
    code, _, err = nmsweep(*words)
    assert code == 2
    assert "5 examples, but gsm8k has only the split that is evaluated (test); add train.jsonl beside" in err
    assert not results.exists()


def test_other_examples_make_another_cell(nmsweep: Call, results: Path, mirror_of_sums: Path) -> None:
    source = find_task("gsm8k", mirror_of_sums)
    before, without = source.fingerprint(examples=True), source.fingerprint()
    write_lines(mirror_of_sums / "gsm8k" / "train.jsonl", sums(9, 3))
    assert find_task("gsm8k", mirror_of_sums).fingerprint(examples=True) != before
    assert find_task("gsm8k", mirror_of_sums).fingerprint() == without


@pytest.mark.parametrize("lacking", ["package", "data"])
def test_ifeval_says_what_it_lacks(
    lacking: str, nmsweep: Call, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "mirror" / "ifeval" / "train.jsonl", [{"key": 1, "prompt": "Say hi."}])
    if lacking == "package":
        monkeypatch.setattr(requirements, "PACKAGES", {"ifeval": ("no_such_package_anywhere",)})
    else:
        monkeypatch.setattr(requirements, "PACKAGES", {})
        monkeypatch.setattr(requirements, "NLTK_DATA", {"ifeval": "tokenizers/no_such_data"})
    words = (*TINY, "tasks=ifeval", f"data.mirror={tmp_path / 'mirror'}", f"results_dir={results}")
    code, _, err = nmsweep(*words)
    assert code == 2
    assert ("pip install 'nmsweep[ifeval]'" if lacking == "package" else "nltk.downloader no_such_data") in err
    assert not results.exists()


def test_ifeval_runs_where_its_extra_is_installed(
    nmsweep: Call, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    english = (
        tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    )  # an untrained sentence splitter is enough here
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (english / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    rules = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{}, {"num_words": 3, "relation": "at least"}]
    row = {"key": 1, "prompt": "Write without commas.", "instruction_id_list": rules, "kwargs": kwargs}
    write_lines(tmp_path / "mirror" / "ifeval" / "train.jsonl", [row, {**row, "key": 2}])
    words = (*TINY, "tasks=ifeval", f"data.mirror={tmp_path / 'mirror'}", f"results_dir={results}", "pattern=dense")
    code, _, err = nmsweep(*words)
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    assert set(record.metrics["metric"]) == {
        f"{level}_level_{how}_acc" for level in ("prompt", "inst") for how in ("strict", "loose")
    }
    assert [len(values) for values in record.samples["values_inst_level_strict_acc"]] == [2, 2]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_fewshot": 3},
        {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Be brief."},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False},
    ],
    ids=["plain", "few-shot", "chat", "one message"],
)
def test_prompts_and_numbers_are_the_harnesss(how: dict[str, Any], science: Path) -> None:
    model, tokenizer = tiny_model("tiny-llama", 0, torch.float64, torch.device("cpu")), tiny_tokenizer("tiny-llama")
    tokenizer.chat_template = CHAT
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=["own_science"],
        task_manager=TaskManager(include_path=str(science), include_defaults=False), bootstrap_iters=0,
        num_fewshot=how.get("num_fewshot"), apply_chat_template=how.get("apply_chat_template", False),
        system_instruction=how.get("system_instruction"),
        fewshot_as_multiturn=how.get("fewshot_as_multiturn", how.get("apply_chat_template", False)),  # as its command line
    )  # fmt: skip
    ours = harness.measure(
        model, tokenizer, find_task("own_science", None, science), EvalConfig(**how, batch_tokens=512)
    )
    (metric,) = ours.metrics
    assert (metric.metric, metric.n_items) == ("acc", 19)
    assert metric.value == pytest.approx(theirs["groups"]["own_science"]["acc,none"])
    for task, samples in theirs["samples"].items():
        own = ours.samples[ours.samples["subtask"] == task]
        wanted = [[value for (value, _), *_ in sample["resps"]] for sample in samples]
        assert len(own) == len(wanted)
        for a, b in zip(own["loglikelihoods"], wanted, strict=True):
            assert list(a) == pytest.approx(b, abs=1e-6)
        assert own["doc_hash"].tolist() == [sample["doc_hash"] for sample in samples]


def test_a_yaml_that_says_no_examples_is_not_overruled(science: Path) -> None:
    model, tokenizer = tiny_model("tiny-llama", 0, torch.float64, torch.device("cpu")), tiny_tokenizer("tiny-llama")
    edit(science / "sky.yaml", num_fewshot=0)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=["own_science"], num_fewshot=3, limit=4,
        task_manager=TaskManager(include_path=str(science), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    source = find_task("own_science", None, science)
    ours = harness.measure(model, tokenizer, source, EvalConfig(limit=4, num_fewshot=3, batch_tokens=512)).samples
    for task, samples in theirs["samples"].items():
        own = ours[ours["subtask"] == task]["loglikelihoods"]
        for a, b in zip(own, samples, strict=True):
            assert list(a) == pytest.approx([value for (value, _), *_ in b["resps"]], abs=1e-6)
    assert [leaf.shots(3) for leaf in source.leaves] == [3, 0]


def test_tasks_of_a_group_with_other_examples_make_another_cell(science: Path) -> None:
    def identity(*words: str) -> tuple[str, ...]:
        given = ("model=tiny-llama", "pattern=dense", "tasks=own_science", f"eval.include_path={science}", *words)
        (cfg,) = cells_of(given, multirun=False, config_dir=None)
        (source,) = task_sources(cfg)
        return tuple(task_identity(source, cfg).values())

    edit(science / "sky.yaml", num_fewshot=0)
    version_of_yaml = find_task("own_science", None, science).version
    assert identity()[0] == identity("eval.num_fewshot=0")[0] == version_of_yaml
    assert identity("eval.num_fewshot=3")[0].startswith(f"{version_of_yaml}/")
    assert find_task("ifeval", None).shots(5) == 0


def test_turns_need_a_chat(nmsweep: Call, results: Path) -> None:
    code, _, err = nmsweep(*TINY, "tasks=mini", "eval.fewshot_as_multiturn=true", f"results_dir={results}")
    assert code == 2
    assert "eval.fewshot_as_multiturn: true, but without a chat there are no turns" in err


@pytest.fixture
def of_a_hub(science: Path) -> Path:
    """Move the sky task to a folder that `datasets` reads as it reads the hub: test, and examples as train."""
    folder = science.parent / "set"
    folder.mkdir()
    for split, name in (("test", "sky"), ("train", "examples")):
        shutil.copy(science.parent / "data" / f"{name}.jsonl", folder / f"{split}.jsonl")
    edit(science / "sky.yaml", dataset_path=str(folder), dataset_kwargs=None, training_split=None)
    return science


@pytest.mark.parametrize("named", [{}, {"fewshot_split": "test"}, {"fewshot_config": {"split": "test[:4]"}}])
def test_examples_never_come_from_the_evaluated_split_of_the_hub(
    named: dict[str, Any], nmsweep: Call, results: Path, of_a_hub: Path
) -> None:
    edit(of_a_hub / "sky.yaml", **named)
    words = (*TINY, "tasks=own_sky", f"eval.include_path={of_a_hub}", f"results_dir={results}", "pattern=dense")
    code, _, err = nmsweep(*words, "eval.num_fewshot=2")
    assert code == 2
    assert "2 examples, but own_sky has only the split that is evaluated (test); take eval.num_fewshot=0" in err
    edit(of_a_hub / "sky.yaml", training_split="train")
    code, _, err = nmsweep(*words, "eval.num_fewshot=2")
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    assert record.provenance["tasks"]["own_sky"]["scoring"].endswith("2 examples from train")
    task = harness_task(find_task("own_sky", None, of_a_hub), 2).task
    examples = (of_a_hub.parent / "set" / "train.jsonl").read_text()
    assert all(json.dumps(row["question"]) in examples for row in task.sampler.df)


def test_a_group_is_one_task_of_a_cell(nmsweep: Call, results: Path, science: Path) -> None:
    words = (*TINY, "tasks=own_science", f"eval.include_path={science}", f"results_dir={results}", "pattern=2:4")
    code, _, err = nmsweep(*words, "eval.num_fewshot=2", "eval.limit=5")
    assert code == 0, err
    record = next(r for r in map(read_cell, cell_folders(results)) if r.metrics["pattern"].iloc[0] == "2:4")
    assert record.samples["item"].tolist() == list(range(10))
    assert record.samples.groupby("subtask").size().to_dict() == {"own_earth": 5, "own_sky": 5}
    assert record.metrics["value"].item() == record.samples["metric_acc"].mean()
    (items,) = (results / "items").iterdir()
    assert pd.read_parquet(items)["doc_hash"].tolist() == record.samples["doc_hash"].tolist()


def test_an_edited_yaml_of_ones_own_makes_another_cell(nmsweep: Call, results: Path, science: Path) -> None:
    words = (*TINY, "tasks=own_sky", f"eval.include_path={science}", f"results_dir={results}", "pattern=dense")
    for prompt in ("Question: {{question}}\nAnswer:", "{{question}} Answer:"):
        edit(science / "sky.yaml", doc_to_text=prompt)
        code, _, err = nmsweep(*words)
        assert code == 0, err
    first, second = (read_cell(folder).samples["loglikelihoods"].tolist() for folder in cell_folders(results))
    assert [list(values) for values in first] != [list(values) for values in second]


def test_what_a_yaml_includes_and_its_code_are_part_of_it(science: Path) -> None:
    (science / "_base").write_text("description: One.\n")
    (science / "utils.py").write_text("def process_docs(docs):\n    return docs\n")
    edit(science / "sky.yaml", include="_base")
    found = [find_task("own_sky", None, science).version]
    (science / "_base").write_text("description: Another.\n")
    found.append(find_task("own_sky", None, science).version)
    (science / "utils.py").write_text("def process_docs(docs):\n    return docs.select(range(5))\n")
    found.append(find_task("own_sky", None, science).version)
    assert len(set(found)) == 3


def test_where_ones_own_task_lies_changes_nothing(science: Path, tmp_path: Path) -> None:
    here = find_task("own_science", None, science)
    shutil.copytree(science.parent / "data", tmp_path / "elsewhere" / "data")
    shutil.copytree(science, tmp_path / "elsewhere" / "yamls")
    for file in (tmp_path / "elsewhere" / "yamls").iterdir():
        file.write_text(file.read_text().replace(str(science.parent), str(tmp_path / "elsewhere")))
    there = find_task("own_science", None, tmp_path / "elsewhere" / "yamls")
    assert (there.version, there.content()) == (here.version, here.content())


def test_the_version_of_a_shipped_task_is_the_harnesss() -> None:
    assert find_task("arc_easy", None).version == f"1.0/{version('lm_eval')}"
    assert find_task("mmlu", None).version.startswith(f"2/{version('lm_eval')}/")


def test_a_yaml_that_cannot_be_read_is_named(nmsweep: Call, results: Path, science: Path) -> None:
    (science / "sky.yaml").write_text("task: own_sky\ndoc_to_text: [\n")
    code, _, err = nmsweep(*TINY, "tasks=own_sky", f"eval.include_path={science}", f"results_dir={results}")
    assert code == 2
    assert "sky.yaml is no task YAML" in err


def test_a_tag_stands_for_its_tasks(nmsweep: Call, results: Path, mirror: Path) -> None:
    words = (*TINY, f"data.mirror={mirror}", f"results_dir={results}", "pattern=dense", "eval.limit=3")
    code, _, err = nmsweep(*words, "tasks=ai2_arc")
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    assert set(record.metrics["task"]) == {"arc_easy", "arc_challenge"}
    assert nmsweep(*words, "tasks=ai2_arc+arc_easy+arc_challenge")[0] == 0
    assert len(cell_folders(results)) == 1


def test_a_group_without_a_number_of_its_own_stands_for_its_tasks(nmsweep: Call, results: Path, science: Path) -> None:
    edit(science / "_group.yaml", aggregate_metric_list=None)
    words = (*TINY, "tasks=own_science", f"eval.include_path={science}", f"results_dir={results}", "pattern=dense")
    code, _, err = nmsweep(*words, "eval.limit=3")
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    assert set(record.metrics["task"]) == {"own_earth", "own_sky"}


def test_a_group_that_changes_its_tasks_is_refused(nmsweep: Call, results: Path, science: Path) -> None:
    edit(science / "_group.yaml", task=[{"task": "own_sky", "num_fewshot": 3}, "own_earth"])
    code, _, err = nmsweep(*TINY, "tasks=own_science", f"eval.include_path={science}", f"results_dir={results}")
    assert code == 2
    assert "it sets num_fewshot of own_sky anew" in err


def test_a_metric_that_no_task_of_a_group_has_is_refused(nmsweep: Call, results: Path, science: Path) -> None:
    edit(science / "_group.yaml", aggregate_metric_list=[{"metric": "f1"}])
    words = (*TINY, "tasks=own_science", f"eval.include_path={science}", f"results_dir={results}", "pattern=dense")
    code, _, err = nmsweep(*words, "eval.limit=2")
    assert code != 0
    assert "none of its tasks has its metric f1" in err


def test_small_tasks_count_like_large_ones_where_the_group_says_so(nmsweep: Call, results: Path, science: Path) -> None:
    edit(science / "_group.yaml", aggregate_metric_list=[{"metric": "acc", "weight_by_size": False}])
    words = (*TINY, "tasks=own_science", f"eval.include_path={science}", f"results_dir={results}", "pattern=1:4")
    code, _, err = nmsweep(*words)
    assert code == 0, err
    records = {record.metrics["pattern"].iloc[0]: record for record in map(read_cell, cell_folders(results))}
    sparse, dense = records["1:4"], records["dense"]
    assert sparse.samples.groupby("subtask").size().to_dict() == {"own_earth": 7, "own_sky": 12}
    by_hand = sparse.samples.groupby("subtask")["metric_acc"].mean().mean()
    row = compare(dense.samples, sparse.samples).set_index("metric").loc["acc"]
    assert sparse.metrics["value"].item() == row["value"] == pytest.approx(by_hand)
    assert dense.metrics["value"].item() == row["dense"]
    assert row["value"] != pytest.approx(sparse.samples["metric_acc"].mean())
    assert row["drop_low"] <= row["drop"] <= row["drop_high"]
    assert sparse.metrics["stderr"].item() > 0


def test_mmlu_has_its_57_tasks_and_says_what_a_mirror_lacks(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    assert len(find_task("mmlu", None).members) == 57
    (tmp_path / "empty").mkdir()
    code, _, err = nmsweep(*TINY, "tasks=knowledge", f"data.mirror={tmp_path / 'empty'}", f"results_dir={results}")
    assert code == 2
    assert "task mmlu: 57 of its 57 tasks cannot be had; the first" in err
    assert "mmlu_abstract_algebra/test.jsonl" in err


def test_a_yaml_that_names_a_lost_file_says_so(nmsweep: Call, results: Path, science: Path) -> None:
    (science.parent / "data" / "sky.jsonl").unlink()
    code, _, err = nmsweep(*TINY, "tasks=own_sky", f"eval.include_path={science}", f"results_dir={results}")
    assert code == 2
    assert "which does not exist; correct data_files" in err


@pytest.mark.slow
@pytest.mark.network
def test_gsm8k_runs_on_a_trained_model(nmsweep: Call, results: Path, mirror_of_sums: Path) -> None:
    words = ("model=smollm2", "tasks=gsm8k", f"data.mirror={mirror_of_sums}", f"results_dir={results}", "device=cpu")
    code, _, err = nmsweep("-m", *words, "pattern=8:16", "scope=prefill,decode", "eval.limit=3")
    assert code == 0, err
    found = responses(results)
    assert set(found) == {"dense", "prefill", "decode"}
    assert any("####" in text for text in found["dense"]), "the model takes up the form of the examples"


ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "piqa": ("validation", [{"goal": f"Open jar {i}", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": 0} for i in range(3)]),
    "openbookqa": ("test", [
        {"id": str(i), "question_stem": f"Ice in sun {i}", "choices": {"text": ["melts", "sings", "flies", "rusts"],
         "label": ["A", "B", "C", "D"]}, "answerKey": "A"} for i in range(3)
    ]),
    "rte": ("validation", [{"sentence1": f"{i} cats sleep.", "sentence2": "Cats sleep.", "label": 0, "idx": i} for i in range(3)]),
    "lambada_openai": ("test", [{"text": f"He took {i} nuts and a long red rope"} for i in range(3)]),
}  # fmt: skip
"""Rows in the form of the data sets on the hub."""


def test_the_other_tasks_of_core_run_from_a_mirror(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    for task, (split, rows) in ROWS.items():
        write_lines(tmp_path / "mirror" / task / f"{split}.jsonl", rows)
    words = (*TINY, f"tasks={'+'.join(ROWS)}", f"data.mirror={tmp_path / 'mirror'}", f"results_dir={results}")
    code, _, err = nmsweep(*words, "pattern=dense")
    assert code == 0, err
    (record,) = map(read_cell, cell_folders(results))
    assert set(record.metrics["task"]) == set(ROWS)
    assert set(record.metrics["n_items"]) == {3}
    lambada = record.samples[record.samples["task"] == "lambada_openai"]
    metric = record.metrics[record.metrics["metric"] == "perplexity"]["value"].item()
    mean = sum(values[0] for values in lambada["loglikelihoods"]) / 3
    assert metric == pytest.approx(math.exp(-mean))


@pytest.mark.slow
def test_mmlu_runs_from_a_mirror(nmsweep: Call, results: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    for member in find_task("mmlu", None).members:
        rows = [{"question": f"{member.task} {i}?", "choices": ["a", "b", "c", "d"], "answer": i} for i in range(3)]
        for split in ("test", "dev"):
            write_lines(mirror / member.task / f"{split}.jsonl", rows)
    words = (*TINY, "tasks=knowledge", f"data.mirror={mirror}", f"results_dir={results}", "eval.num_fewshot=2")
    code, _, err = nmsweep(*words, "pattern=2:4")
    assert code == 0, err
    record = next(r for r in map(read_cell, cell_folders(results)) if r.metrics["pattern"].iloc[0] == "2:4")
    assert record.metrics["n_items"].tolist() == [57 * 3]
    assert record.samples["subtask"].nunique() == 57
