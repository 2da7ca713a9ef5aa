"""`nmsweep prefetch`: sizes first, then files that a run reads offline; what is missing, exactly."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nmsweep.data import prefetch
from nmsweep.data.tasks import MINI_FOLDER, TEXT_TASKS, find_task
from nmsweep.record import cell_folders

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A task whose data set is a folder, which the data library reads as it reads the hub's; its YAML's folder."""
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
    assert len(sizes) == len(fetched) == 2
    assert max(sizes) < min(fetched), "sizes come first"
    kept = [json.loads(line) for line in (tmp_path / "mirror" / "own_science" / "test.jsonl").read_text().splitlines()]
    assert kept == [json.loads(line) for line in (tmp_path / "set" / "test.jsonl").read_text().splitlines()]
    (tmp_path / "set" / "test.jsonl").unlink()
    code, _, err = nmsweep(*words(hub, tmp_path), "pattern=dense", "device=cpu", f"results_dir={results}")
    assert code == 0, err
    assert len(cell_folders(results)) == 1


def test_it_goes_on_where_it_stopped_and_mends_what_is_damaged(nmsweep: Call, hub: Path, tmp_path: Path) -> None:
    nmsweep("prefetch", *words(hub, tmp_path))
    assert nmsweep("prefetch", *words(hub, tmp_path))[1].count(": there") == 3  # the model and two files
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
    monkeypatch.setattr(prefetch, "_why_unreachable", lambda: asked.append("hub") or OSError("no network"))
    code, out, _ = nmsweep("prefetch", "model=tiny-llama", "tasks=arc_easy+piqa+mmlu+mini", f"data.mirror={mirror}")
    assert code == 1
    missing = [line.removeprefix("missing: ") for line in out.splitlines() if line.startswith("missing: ")]
    assert "piqa/validation.jsonl (task piqa, baber/piqa, split validation)" in missing
    assert len(missing) == 1 + 57
    assert "arc_easy/test.jsonl: there" in out
    assert "58 missing" in out
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
    prefetch._write_text(place, rows)
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
