"""`nmsweep prefetch` prints sizes, then fetches the files that a run reads offline, and lists exactly what is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nmsweep.data import prefetch, tasks
from nmsweep.data.tasks import MINI_FOLDER, TEXT_TASKS, file_sha256, find_task
from nmsweep.results.record import cell_folders

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WikiText-2 as a folder, which `datasets` reads like the hub's, with different words in each split."""
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = [f" {split} {' '.join(f'{split}{at}{word}' for word in range(40))} . \n" for at in range(40)]
        rows = [{"text": text} for line in lines for text in ("", line)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tasks, "_WIKITEXT_HUB", (str(folder), None))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Return the folder of a task's YAML; its data set is a folder, which `datasets` reads like one of the hub's."""
    rows = (MINI_FOLDER / "science.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(rows[:10]))
    (tmp_path / "set" / "test.jsonl").write_text("".join(rows[10:22]))
    config = {
        "task": "own_science", "dataset_path": str(tmp_path / "set"), "output_type": "multiple_choice",
        "training_split": "train", "test_split": "test", "num_fewshot": 2,
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "yamls").mkdir()
    (tmp_path / "yamls" / "own.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "yamls"


def words(hub: Path, tmp_path: Path) -> tuple[str, ...]:
    return ("model=tiny-llama", "tasks=own_science", f"eval.include_path={hub}", f"data.mirror={tmp_path / 'mirror'}")


def test_a_filled_mirror_is_what_a_run_reads(nmsweep: Call, hub: Path, tmp_path: Path, results: Path) -> None:
    code, out, err = nmsweep("prefetch", *words(hub, tmp_path))
    assert code == 0, err
    lines = out.splitlines()
    sizes = [at for at, line in enumerate(lines) if "to fetch from" in line]
    fetched = [at for at, line in enumerate(lines) if line.endswith("rows")]
    assert len(sizes) == len(fetched) == 3
    assert max(sizes) < min(fetched), "sizes come first"
    kept = [json.loads(line) for line in (tmp_path / "mirror" / "own_science" / "test.jsonl").read_text().splitlines()]
    assert kept == [json.loads(line) for line in (tmp_path / "set" / "test.jsonl").read_text().splitlines()]
    (tmp_path / "set" / "test.jsonl").unlink()
    code, _, err = nmsweep(*words(hub, tmp_path), "pattern=dense", "device=cpu", f"results_dir={results}")
    assert code == 0, err
    assert len(cell_folders(results)) == 1


def test_calibration_texts_are_fetched_too(
    nmsweep: Call, hub: Path, wikitext: Path, tmp_path: Path, results: Path
) -> None:
    given = tuple(f"{word}+wikitext2" if word.startswith("tasks=") else word for word in words(hub, tmp_path))
    code, _, err = nmsweep("prefetch", *given)
    assert code == 0, err
    kept = {file.name for file in (tmp_path / "mirror" / "wikitext2").iterdir()}
    assert kept == {"test.txt", "test.txt.sha256", "train.txt", "train.txt.sha256"}
    for folder in (wikitext, tmp_path / "set"):
        shutil.rmtree(folder)
    method = ("pattern=2:4", "mitigation=shift_static", "calibration.seqlen=32", "eval.seqlen=64", "baseline=false")
    code, _, err = nmsweep(*given, *method, "device=cpu", f"results_dir={results}")
    assert code == 0, err
    assert len(cell_folders(results)) == 1


def test_a_task_that_takes_no_examples_needs_no_split_for_them(tmp_path: Path) -> None:
    wanted = prefetch.needs(["ifeval", "gsm8k"], tmp_path, 5, None)
    assert {(need.task, need.split) for need in wanted} == {("ifeval", "train"), ("gsm8k", "test"), ("gsm8k", "train")}


def test_an_existing_training_text_is_not_replaced(nmsweep: Call, hub: Path, tmp_path: Path) -> None:
    head = tmp_path / "mirror" / "wikitext2" / "train_head.txt"
    head.parent.mkdir(parents=True)
    head.write_text("A text of one's own.\n")
    code, out, err = nmsweep("prefetch", *words(hub, tmp_path))
    assert code == 0, err
    assert "wikitext2/train_head.txt: there" in out
    assert not head.with_name("train.txt").exists()
    assert nmsweep("prefetch", "model=tiny-llama", "tasks=mini")[0] == 0, "mini tasks have a text of their own"


def test_one_bad_data_set_does_not_stop_the_others(nmsweep: Call, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "train.jsonl").write_text('{"question": \n')
    config = yaml.safe_load((hub / "own.yaml").read_text())
    other = {**config, "task": "own_other", "dataset_path": str(tmp_path / "wikitext"), "num_fewshot": 0}
    (hub / "other.yaml").write_text(yaml.safe_dump(other))
    given = tuple(word.replace("own_science", "own_science+own_other") for word in words(hub, tmp_path))
    code, out, _ = nmsweep("prefetch", *given)
    assert code == 1
    missing = [line for line in out.splitlines() if line.startswith("missing: ")]
    assert len(missing) == 2
    assert all("own_science/" in line and "does not give it (DatasetGenerationError: " in line for line in missing)
    assert (tmp_path / "mirror" / "own_other" / "test.jsonl").is_file()
    assert (tmp_path / "mirror" / "wikitext2" / "train.txt").is_file()


def test_every_file_has_a_digest_of_its_own(hub: Path, tmp_path: Path) -> None:
    """Processes that fetch at the same time write no common file."""
    mirror = tmp_path / "mirror"
    wanted = prefetch.needs(["own_science"], mirror, None, hub)
    for need in wanted:
        prefetch.fetch(need)
    written = {file.relative_to(mirror).as_posix() for file in mirror.rglob("*") if file.is_file()}
    assert written == {f"own_science/{split}.jsonl{end}" for split in ("test", "train") for end in ("", ".sha256")}
    digest, name = (mirror / "own_science" / "test.jsonl.sha256").read_text().split()
    assert (digest, name) == (file_sha256(mirror / "own_science" / "test.jsonl"), "test.jsonl")


def test_it_resumes_and_replaces_damaged_files(nmsweep: Call, hub: Path, tmp_path: Path) -> None:
    nmsweep("prefetch", *words(hub, tmp_path))
    assert (
        nmsweep("prefetch", *words(hub, tmp_path))[1].count(": there") == 4
    )  # the model, two files and the training text
    file, other = (tmp_path / "mirror" / "own_science" / f"{split}.jsonl" for split in ("test", "train"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    other.unlink()
    code, out, _ = nmsweep("prefetch", *words(hub, tmp_path))
    assert code == 0
    assert "test.jsonl: damaged, to fetch again" in out
    assert "train.jsonl: to fetch from" in out
    assert file.read_bytes() == whole
    assert other.is_file()


def test_offline_it_says_exactly_what_is_missing(
    nmsweep: Call, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tasks, "_WIKITEXT_HUB", ("Salesforce/wikitext", "wikitext-2-raw-v1"))
    monkeypatch.setattr(prefetch, "why_unreachable", lambda: asked.append("hub") or "no network")
    code, out, _ = nmsweep("prefetch", "model=tiny-llama", "tasks=arc_easy+piqa+mmlu+mini", f"data.mirror={mirror}")
    assert code == 1
    missing = [line.removeprefix("missing: ") for line in out.splitlines() if line.startswith("missing: ")]
    assert "piqa/validation.jsonl (task piqa, baber/piqa, split validation)" in missing
    assert len(missing) == 1 + 57 + 1
    assert "arc_easy/test.jsonl: there" in out
    assert "59 missing" in out
    assert out.count("no network") == 1
    assert len(asked) == 2, "the hub is asked once for sizes and once for files"


def test_a_mirror_is_needed_for_tasks_of_the_hub_only(nmsweep: Call) -> None:
    code, out, err = nmsweep("prefetch", "model=tiny-llama", "tasks=arc_easy")
    assert (code, out) == (2, "")
    assert "add data.mirror=DIR" in err
    assert nmsweep("prefetch", "model=tiny-llama", "tasks=mini")[0] == 0


def test_the_raw_text_reads_back_as_the_hubs_rows(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": " = A title = \n"}, {"text": ""}, {"text": " A line . \n"}]
    place = tmp_path / "wikitext2" / "test.txt"
    place.parent.mkdir()
    place.write_text("".join(prefetch.wikitext_lines(rows)))
    from nmsweep.data.tasks import _wikitext_rows

    assert "wikitext2" in TEXT_TASKS
    assert _wikitext_rows(find_task("wikitext2", tmp_path)) == [row["text"] for row in rows]


def test_gated_or_unreachable_models_are_missing_too(nmsweep: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsweep.models import hub as models_hub

    monkeypatch.setattr(models_hub, "_ask", lambda repo, revision: OSError("no network"))
    monkeypatch.setattr(models_hub, "cached_folder", lambda spec: None)
    code, out, _ = nmsweep("prefetch", "model=llama", "tasks=mini")
    assert code == 1
    assert "model llama: to fetch (its source cannot be reached)" in out
    assert "missing: model llama: meta-llama/Llama-3.1-8B-Instruct cannot be had from the hub" in out
