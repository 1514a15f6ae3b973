"""`yrun init`: copy the shipped recipes."""

import shutil
from pathlib import Path

from yrunner.console import say
from yrunner.errors import YRunnerError
from yrunner.storage.run_dir import whole_folder


def init(folder: Path) -> None:
    """Copy the shipped recipes and their data to `folder`, which must not exist yet."""
    if folder.exists():
        raise YRunnerError(f"{folder} already exists", remedy="name a new folder")
    ignore = shutil.ignore_patterns("__pycache__")
    with whole_folder(folder.absolute()) as partial:
        shutil.copytree(shipped("recipes"), partial, ignore=ignore, dirs_exist_ok=True)
    say(f"recipes are in {folder}")
    say(f"try: yrun train {folder / 'legal_sft.yaml'}")


def shipped(name: str) -> Path:
    """A shipped folder: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped" / name
    return installed if installed.is_dir() else package.parent / name
