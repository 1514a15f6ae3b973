"""What is disturbed: every kind of work that writes, from the data to the merged model."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.fault_campaign.child import Ending, run
from benchmarks.fault_campaign.project import write_project

Command = tuple[str, ...]

VARYING = {"targets_per_second", "memory_gib", "seconds", "tokens_per_second"}
"""Keys of figures that differ between two runs of the same command."""


@dataclass(frozen=True)
class Stage:
    """A kind of work, and what it leaves."""

    name: str
    after: tuple[Command, ...]
    """What has been run before, undisturbed."""
    command: Command
    again: tuple[Command, ...]
    """How a person goes on after a fault: the first of these that works."""
    results: tuple[str, ...]
    """Globs of the files that have to be what they are after an undisturbed run."""
    data: str = "train.jsonl"
    """The file that is learned from."""


def _trained(name: str) -> tuple[str, ...]:
    folder = f"outputs/{name}"
    return (
        *(f"{folder}/model/*", f"{folder}/before.json", f"{folder}/after.json"),
        *(f"{folder}/metrics.jsonl", f"{folder}/checkpoints/*/*.safetensors"),
        f"{folder}/report.html",
    )


BASE: Command = ("train", "base.yaml")
SPEAKER: Command = ("train", "speaker.yaml")
TUNED: Command = ("train", "tuned.yaml")
INIT: Command = ("init", "outputs/recipes")
EXPORT: Command = ("merge", "tuned.yaml", "merge.gguf=f16")
REPLAY: Command = ("replay", "replaying.yaml")
COMPARE: Command = ("compare", "compared.yaml")


def _training(name: str, after: tuple[Command, ...], what: str) -> Stage:
    command: Command = ("train", f"{name}.yaml")
    again = ((*command, "--resume"), (*command, "--overwrite"))
    data = "train.jsonl" if after else "base.jsonl"
    return Stage(what, after, command, again, _trained(name), data)


STAGES = (
    _training("tuned", (BASE,), "training"),
    Stage(
        "sorting",
        (BASE,),
        ("sort", "tuned.yaml"),
        (("sort", "tuned.yaml"), ("sort", "tuned.yaml", "--overwrite")),
        ("outputs/tuned/sort/*.jsonl", "outputs/tuned/sort/report.html"),
    ),
    Stage(
        "preparing data",
        (BASE,),
        ("check", "wide.yaml", "--sample", "0"),
        (("check", "wide.yaml", "--sample", "0"),),
        ("outputs/.prepared/*/*",),
        "wide.jsonl",
    ),
    Stage(
        "merging",
        (BASE, TUNED),
        ("merge", "tuned.yaml"),
        (("merge", "tuned.yaml"),),
        ("outputs/tuned/merged/*", "outputs/tuned/merge.json"),
    ),
    _training("saving", (BASE,), "saving"),
    Stage(
        "evaluating",
        (BASE, TUNED),
        ("eval", "tuned.yaml"),
        (("eval", "tuned.yaml"),),
        ("outputs/tuned/eval.json", "outputs/tuned/eval.html"),
    ),
    _training("base", (), "training a base"),
    Stage(
        "exporting GGUF",
        (BASE, TUNED),
        EXPORT,
        (EXPORT,),
        ("outputs/tuned/merged/*", "outputs/tuned/gguf/*", "outputs/tuned/merge.json"),
    ),
    Stage(
        "replaying",
        (SPEAKER,),
        REPLAY,
        (REPLAY,),
        ("outputs/replay/*/*.jsonl",),
        "base.jsonl",
    ),
    Stage(
        "starting a project",
        (),
        INIT,
        # Where they are there already, that is said; then they must be whole.
        (INIT, ("check", "outputs/recipes/tiny_base.yaml", "--sample", "0")),
        ("outputs/recipes/**/*",),
    ),
    Stage(
        "comparing",
        (BASE,),
        COMPARE,
        (COMPARE,),
        (
            *("outputs/compared/arms/*/model/*", "outputs/compared/arms/*/metrics.jsonl"),
            *("outputs/compared/arms/*/measured.json", "outputs/compared/compare.*"),
        ),
    ),
)
"""Those that differ most come first: a short campaign takes the first ones only."""


@dataclass(frozen=True)
class Reference:
    """A command that nothing has happened to."""

    ending: Ending
    results: Mapping[str, str]
    """A hash of each file that it leaves, by its path."""
    size: int
    """Bytes of everything below `outputs` afterwards."""


class Workshop:
    """A folder in which the project is set up again for every case, always under one path."""

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        self.stages = stages
        """The kinds of work that are disturbed, in turn."""
        self.project = folder / "project"
        self.kept = folder / "kept"
        self.references: dict[str, Reference] = {}

    def set_up(self, stage: Stage) -> None:
        """The project as it is before the command of the stage."""
        kept = self._kept(stage.after)
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(kept, self.project)

    def reference(self, stage: Stage) -> Reference:
        """What the command of the stage does when nothing happens to it."""
        if stage.name not in self.references:
            self.set_up(stage)
            ending = run(stage.command, self.project)
            assert ending.code == 0, ending.output
            size = size_on_disk(self.project / "outputs")
            self.references[stage.name] = Reference(ending, self.results(stage), size)
        return self.references[stage.name]

    def go_on(self, stage: Stage) -> Ending:
        """Do what the messages say until the command has done its work."""
        for command in stage.again:
            ending = run(command, self.project)
            if ending.code != 2:
                break
        return ending

    def results(self, stage: Stage) -> dict[str, str]:
        """A hash of each file that the stage leaves, by its path."""
        found = (path for glob in stage.results for path in self.project.glob(glob))
        paths = sorted(path for path in found if path.is_file())
        assert paths, f"{stage.name} has left nothing"
        return {str(path.relative_to(self.project)): _hash(path) for path in paths}

    def _kept(self, after: tuple[Command, ...]) -> Path:
        """The project with these commands done; made once."""
        kept = self.kept / "+".join(["project", *(recipe for _, recipe in after)])
        if not kept.exists():
            shutil.rmtree(self.project, ignore_errors=True)
            write_project(self.project)
            for command in after:
                ending = run(command, self.project)
                assert ending.code == 0, ending.output
            shutil.copytree(self.project, kept)
        return kept


def size_on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take on a file system of pages of 4 KiB."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // 4096) * 4096 for size in sizes)


def hashes_below(folder: Path) -> dict[str, str]:
    """A hash of each file of a folder that bears its final name, by its path."""
    return {str(path): _hash(path) for path in _final(folder)}


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Files that differ, or that only one of the two has."""
    return [path for path in sorted({*expected, *found}) if expected.get(path) != found.get(path)]


def half_written(project: Path) -> list[str]:
    """Files below `outputs` that are not whole, though they bear their final names."""
    return [str(path.relative_to(project)) for path in _final(project / "outputs") if _fails(path)]


def _final(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(_is_hidden(part) for part in parts):
            yield path


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".prepared"


def _fails(path: Path) -> bool:
    check = CHECKS.get(path.suffix)
    try:
        return check is not None and check(path) is False
    except Exception:  # noqa: BLE001  whatever a reader says: the file is not whole
        return True


def _read_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():
            weights.get_tensor(name)


def _read_lines(path: Path) -> bool:
    lines = path.read_text("utf-8").split("\n")
    for line in lines[:-1]:
        json.loads(line)
    # A log is appended to, and its reader passes over a line without an end.
    return lines[-1] == "" or path.name == "metrics.jsonl"


CHECKS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": _read_lines,
    ".html": lambda path: path.read_text("utf-8").rstrip().endswith("</html>"),
    ".safetensors": _read_safetensors,
}


def _hash(path: Path) -> str:
    if path.suffix == ".html":
        return "a page"  # it may say how long something took; that it is whole is checked
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        kept = [_without_varying(json.loads(line)) for line in lines]
        content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_varying(part) for key, part in value.items() if key not in VARYING}
    return [_without_varying(part) for part in value] if isinstance(value, list) else value
