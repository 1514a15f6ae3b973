"""Which files belong to a run: no other is ever removed, overwritten or written through a link."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp

from yrunner.errors import RunError

WRITTEN = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("chat_template.json", "*.jinja", "README.md", "Modelfile", "*.py"),
    *("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.bin", "latest"),
    *("trainer_state.json", "manifest.json", "origin.json", "step.json", "events.out.tfevents.*"),
)
"""Names of the files that yrunner and its libraries write into the folders of a run: checkpoints,
trackers and models. JSON only by full names, since people put JSON files there too."""
UNFINISHED = (".*.partial", ".*.previous", ".*.removed", ".*.damaged", ".rehearsal")
"""Names of our files and folders while they are written or removed."""


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder, if it exists.

    A folder is renamed first: a kill half-way leaves no half of it under its name.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    going = path.with_name(f".{path.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


def foreign_files(folder: Path) -> Iterator[Path]:
    """Files below a run's folder that no run writes, such as somebody's notes."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_one_of(name, UNFINISHED)]
        for name in sorted(files):
            if not _is_one_of(name, (*WRITTEN, *UNFINISHED)):
                yield Path(place, name)


def check_ownership(
    home: Path, mark: Path, places: Sequence[Path], replaced: Sequence[Path] = ()
) -> None:
    """Raise `RunError` where writing `places` would fail, leave `home`, or lose foreign files.

    They are ours only if `mark` exists, which is written before them and removed after them.
    `replaced` are the folders among them that may be removed, with everything in them.
    """
    check_writable(home)
    check_links(places, home)
    foreign = next((path for path in places if path.exists() and not mark.exists()), None)
    if foreign is not None:
        raise RunError(
            f"{foreign} was not written by yrunner and would be overwritten",
            remedy="set another output, or move it",
        )
    for folder in replaced:
        foreign = next(foreign_files(folder), None)
        if foreign is not None:
            raise RunError(
                f"{foreign} was not written by yrunner and would be deleted with {folder}",
                remedy="move it to another place",
            )


def check_links(paths: Iterable[Path], home: Path) -> None:
    """Raise `RunError` for a link among the paths to a target outside `home`.

    A run folder may come from somebody else, whose link could point to any file of this machine.
    """
    inside = home.resolve()
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise RunError(
                f"{path} is a link to {path.resolve()}, outside the run folder",
                remedy="remove the link; to write elsewhere, set output",
            )


def check_writable(folder: Path) -> None:
    """Raise `RunError` where the folder cannot be created or written to."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise RunError(
            f"{folder} cannot be the run folder: {place} is not a folder",
            remedy="set another output, such as output=outputs/another",
        )
    if long := _too_long_name(place, folder):
        raise RunError(
            f"{folder} cannot be the run folder: the name {long[:40]}... is too long for this disk",
            remedy="set a shorter name, or another output",
        )
    if not _accepts_a_folder(place):
        raise RunError(
            f"{place} is not writable",
            remedy="change its permissions, or set another output such as output=/another/folder",
        )


def _too_long_name(place: Path, folder: Path) -> str | None:
    """The name below `place` that its file system does not allow; None if it allows all."""
    room = os.pathconf(place, "PC_NAME_MAX") - len(".x.partial")
    names = folder.relative_to(place).parts
    return next((name for name in names if len(os.fsencode(name)) > room), None)


def _accepts_a_folder(place: Path) -> bool:
    """Whether a folder can be made there: for root, /proc has the permissions and refuses."""
    if not os.access(place, os.W_OK | os.X_OK):
        return False
    try:
        os.rmdir(mkdtemp(prefix=".yrun-", dir=place))
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)  # a full disk has messages of its own
    return True


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
