"""What belongs to a run: nothing else is ever removed, replaced or written through a link."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from yrunner.errors import RunError

WRITTEN = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("chat_template.json", "*.jinja", "README.md", "Modelfile", "*.py"),
    *("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.bin", "latest"),
    *("trainer_state.json", "manifest.json", "step.json", "events.out.tfevents.*"),
)
"""Names of the files that we, or the libraries that save for us, write into the folders of a run:
checkpoints, trackers and models. JSON by its whole name, for that is what people leave there."""
UNFINISHED = (".*.partial", ".*.previous", ".*.removed", ".*.damaged", ".rehearsal")
"""Names that files and folders of ours have before they are complete, and when they must go."""


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; a link's target stays.

    A folder loses its name at once: a kill half-way leaves no half of it under that name.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    going = path.with_name(f".{path.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


def strangers(folder: Path) -> Iterator[Path]:
    """Files below a run's folder that no run writes there, such as somebody's notes."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_one_of(name, UNFINISHED)]
        for name in sorted(files):
            if not _is_one_of(name, (*WRITTEN, *UNFINISHED)):
                yield Path(place, name)


def check_belongings(
    home: Path, mark: Path, places: Sequence[Path], replaced: Sequence[Path] = ()
) -> None:
    """Raise `RunError` where work on `places` would fail, leave `home`, or lose what is not ours.

    They are ours only where there is a `mark`, which is written before them and removed after them.
    `replaced` are the folders among them that may be removed, with all that is in them.
    """
    check_writable(home)
    check_links(places, home)
    foreign = next((path for path in places if path.exists() and not mark.exists()), None)
    if foreign is not None:
        raise RunError(
            f"{foreign} was not made by yrunner, and would be replaced",
            remedy="choose another output, or move that away",
        )
    for folder in replaced:
        stranger = next(strangers(folder), None)
        if stranger is not None:
            raise RunError(
                f"{stranger} was not made by yrunner, and would be lost with {folder}",
                remedy="move it to another place",
            )


def check_links(paths: Iterable[Path], home: Path) -> None:
    """Raise `RunError` for a link among the paths that leads out of `home`: it would be followed.

    A run folder may come from somebody else, whose link could lead to any file of this machine.
    """
    inside = home.resolve()
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise RunError(
                f"{path} is a link that leads out of the run folder, to {path.resolve()}",
                remedy="remove the link; to write elsewhere, set output to that place",
            )


def check_writable(folder: Path) -> None:
    """Raise `RunError` where the folder cannot be written, or cannot be made."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise RunError(
            f"{folder} cannot be the run folder: {place} is no folder",
            remedy="choose another place, such as output=outputs/another",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(
            f"{place} cannot be written",
            remedy="set its permissions, or choose another place such as output=/another/folder",
        )


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
