"""How long from nothing to the first trained model, beside LLaMA-Factory, Axolotl and TRL?

    python -m benchmarks.first_hour MODEL [--tools yrunner LLaMA-Factory Axolotl TRL]
        [--rows 128] [--cold]

Each tool gets a virtual environment of its own, is installed by pip as its users do (yrunner from a
clone of this repository), and trains LoRA of rank 16 on short rows, as in `whole_command`.
Reports the seconds of both, the size of the environment, and what a person types and writes. MODEL
is a folder of Hugging Face. `--cold` installs without pip's cache. torch is pinned for all to what
this repository was tested with. Where that comes without CUDA, what other packages have
compiled for it is removed.
"""

import argparse
import json
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.markdown import print_markdown
from benchmarks.paths import ROOT
from benchmarks.peers import PEERS
from benchmarks.whole_command import OURS, Measured, ours_in, run, write_our_recipe, write_rows

TOKENS, LONGEST = 64, 128
DTYPE = "auto"


@dataclass(frozen=True)
class Tool:
    """How a tool is installed and started."""

    packages: tuple[str, ...]
    program: str
    settings: tuple[str, ...]
    """Files that its user writes; none if everything is an option."""
    unfit_packages: tuple[str, ...] = ()
    """Packages that it brings, built for CUDA, that stop it where torch is built without."""
    unfit_files: tuple[str, ...] = ()
    """The same, of packages that it cannot do without."""


TOOLS = {
    OURS: Tool((), "yrun", (f"ours-{DTYPE}.yaml",)),
    "LLaMA-Factory": Tool(
        ("llamafactory==0.9.5",),
        "llamafactory-cli",
        ("llamafactory.yaml", "dataset_info.json"),
        ("torchvision",),
        ("torchaudio/lib/*.so",),
    ),
    "Axolotl": Tool(("axolotl==0.19.0",), "axolotl", ("axolotl.yaml",)),
    "TRL": Tool(("trl[peft]==1.16.0",), "trl", ()),
}


@dataclass(frozen=True)
class Hour:
    """What one tool took."""

    install_seconds: float
    environment_bytes: int
    commands: int
    """Typed from nothing to the trained model."""
    files: int
    keys: int
    """Settings that a person writes: keys of the files, or options."""
    trained: Measured


def main() -> None:
    """Install and run each tool, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--cold", action="store_true", help="install without pip's cache")
    options = parser.parse_args()
    hours = {}
    for name in options.tools:
        with TemporaryDirectory() as folder:
            try:
                hours[name] = first_hour(name, Path(folder), options)
                print(name, hours[name], file=sys.stderr, flush=True)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    print_hours(hours, options)


def first_hour(name: str, folder: Path, options: argparse.Namespace) -> Hour:
    """Install a tool into `folder` and train with it there."""
    tool, model = TOOLS[name], options.model.resolve()
    began = time.perf_counter()
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    programs = environment / "bin"
    what: list[str] = [*tool.packages]
    if name == OURS:
        clone = folder / "yrunner"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        what = ["--constraint", str(clone / "constraints.txt"), "--editable", str(clone)]
    pip = [str(programs / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    cache = ["--no-cache-dir"] if options.cold else []
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    torch = next(line for line in pinned if line.startswith("torch=="))
    subprocess.run([*pip, "install", *cache, torch, *what], check=True)
    if tool.unfit_packages:
        subprocess.run([*pip, "uninstall", "--yes", *tool.unfit_packages], check=True)
    for pattern in tool.unfit_files:
        for file in environment.glob(f"lib/python*/site-packages/{pattern}"):
            file.unlink()
    seconds = time.perf_counter() - began
    write_rows(folder, options.rows, TOKENS)
    program = programs / tool.program
    if name == OURS:
        recipe = write_our_recipe(folder, model, LONGEST, DTYPE)
        command = [str(program), "train", str(recipe)]
    else:
        command = PEERS[name](program, folder, model, LONGEST, None)
    trained = run(command, folder, ours_in(DTYPE) if name == OURS else name)
    written = [json.loads((folder / file).read_text("utf-8")) for file in tool.settings]
    typed = 3 + (name == OURS)  # the clone, environment, installation, training
    keys = sum(map(count_values, written)) if written else len(command[2:]) // 2
    return Hour(seconds, size_of(environment), typed, len(written), keys, trained)


def count_values(settings: Any) -> int:
    """Numbers, texts and switches in nested settings."""
    if isinstance(settings, dict):
        return sum(map(count_values, settings.values()))
    if isinstance(settings, list):
        return sum(map(count_values, settings))
    return 1


def size_of(folder: Path) -> int:
    """Bytes on disk of a folder's files."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_dir())


def print_hours(hours: dict[str, Hour], options: argparse.Namespace) -> None:
    """One row for each tool."""
    cache = "without pip's cache" if options.cold else "with what pip's cache held"
    columns = (
        "tool",
        "commands",
        "files to write",
        "settings in them",
        "installation, s",
        "environment, GB",
        "training command, s",
        "memory, GB",
    )
    rows = [
        [
            name,
            str(hour.commands),
            str(hour.files),
            str(hour.keys),
            f"{hour.install_seconds:.0f}",
            f"{hour.environment_bytes / 1e9:.2f}",
            f"{hour.trained.whole:.1f}",
            f"{hour.trained.peak / 1e9:.2f}",
        ]
        for name, hour in hours.items()
    ]
    title = f"{options.rows} rows of about {TOKENS} tokens, {options.model.name}; installed {cache}"
    print_markdown(title, columns, rows)


if __name__ == "__main__":
    main()
