"""The commands that are disturbed: all that write, from preparing data to merging."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.faults.child import Ending, run
from benchmarks.faults.project import write_project

Command = tuple[str, ...]

VARYING = {"targets_per_second", "memory_gib", "seconds", "tokens_per_second"}
"""Keys whose values differ between two runs of the same command."""


@dataclass(frozen=True)
class Stage:
    """A command and its results."""

    name: str
    after: tuple[Command, ...]
    """Commands that run before, undisturbed."""
    command: Command
    recovery: tuple[Command, ...]
    """Commands that a user tries after a fault, until one works."""
    results: tuple[str, ...]
    """Globs of the files that must match those of an undisturbed run."""
    data: str = "train.jsonl"
    """The training file."""


def _trained(name: str) -> tuple[str, ...]:
    folder = f"outputs/{name}"
    return (
        *(f"{folder}/model/*", f"{folder}/before.json", f"{folder}/after.json"),
        *(f"{folder}/metrics.jsonl", f"{folder}/checkpoints/*/*.safetensors"),
        f"{folder}/report.html",
    )


BASE: Command = ("train", "base.yaml")
WRITER: Command = ("train", "writer.yaml")
TUNED: Command = ("train", "tuned.yaml")
INIT: Command = ("init", "outputs/recipes")
EXPORT: Command = ("merge", "tuned.yaml", "merge.gguf=f16")
REPLAY: Command = ("replay", "replaying.yaml")
COMPARE: Command = ("compare", "compared.yaml")


def _training(name: str, after: tuple[Command, ...], stage_name: str) -> Stage:
    command: Command = ("train", f"{name}.yaml")
    recovery = ((*command, "--resume"), (*command, "--overwrite"))
    data = "train.jsonl" if after else "base.jsonl"
    return Stage(stage_name, after, command, recovery, _trained(name), data)


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
        (WRITER,),
        REPLAY,
        (REPLAY,),
        ("outputs/replay/*/*.jsonl",),
        "base.jsonl",
    ),
    Stage(
        "starting a project",
        (),
        INIT,
        # If init finds them already there, they must be complete.
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
"""The most different ones come first, because a short campaign runs only these."""


@dataclass(frozen=True)
class Reference:
    """The results of an undisturbed command."""

    ending: Ending
    results: Mapping[str, str]
    """Hash of each result, by path."""
    size: int
    """Bytes of everything in `outputs` afterwards."""


class Workshop:
    """A folder in which each case gets a fresh copy of the project, always at the same path."""

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        self.stages = stages
        """The commands that are disturbed, in turn."""
        self.project = folder / "project"
        self.snapshots = folder / "snapshots"
        self.references: dict[str, Reference] = {}

    def set_up(self, stage: Stage) -> None:
        """Restore the project to its state before the command of the stage."""
        snapshot = self._snapshot(stage.after)
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(snapshot, self.project)

    def reference(self, stage: Stage) -> Reference:
        """Run the command of the stage undisturbed, once."""
        if stage.name not in self.references:
            self.set_up(stage)
            ending = run(stage.command, self.project)
            assert ending.code == 0, ending.output
            size = size_on_disk(self.project / "outputs")
            self.references[stage.name] = Reference(ending, self.results(stage), size)
        return self.references[stage.name]

    def recover(self, stage: Stage) -> Ending:
        """Run the recovery commands, as the messages say, until one works."""
        for command in stage.recovery:
            ending = run(command, self.project)
            if ending.code != 2:
                break
        return ending

    def results(self, stage: Stage) -> dict[str, str]:
        """Hash each result of the stage, by path."""
        matches = (path for glob in stage.results for path in self.project.glob(glob))
        paths = sorted(path for path in matches if path.is_file())
        assert paths, f"{stage.name} wrote nothing"
        return {str(path.relative_to(self.project)): _hash(path) for path in paths}

    def _snapshot(self, after: tuple[Command, ...]) -> Path:
        """Return a copy of the project after these commands; made once."""
        snapshot = self.snapshots / "+".join(["project", *(recipe for _, recipe in after)])
        if not snapshot.exists():
            shutil.rmtree(self.project, ignore_errors=True)
            write_project(self.project)
            for command in after:
                ending = run(command, self.project)
                assert ending.code == 0, ending.output
            shutil.copytree(self.project, snapshot)
        return snapshot


def size_on_disk(folder: Path) -> int:
    """Return the bytes of a folder on a file system with pages of 4 KiB."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // 4096) * 4096 for size in sizes)


def hashes_below(folder: Path) -> dict[str, str]:
    """Hash each file of a folder that has its final name, by path."""
    return {str(path): _hash(path) for path in _final(folder)}


def differences(expected: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    """Return the files that differ or are missing on one side."""
    paths = sorted({*expected, *actual})
    return [path for path in paths if expected.get(path) != actual.get(path)]


def half_written(project: Path) -> list[str]:
    """Return the incomplete files in `outputs` that already have their final names."""
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
    except Exception:  # noqa: BLE001  any error of a reader means an incomplete file
        return True


def _read_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():
            weights.get_tensor(name)


def _read_lines(path: Path) -> bool:
    lines = path.read_text("utf-8").split("\n")
    for line in lines[:-1]:
        json.loads(line)
    # Logs are appended to; their reader skips an incomplete last line.
    return lines[-1] == "" or path.name == "metrics.jsonl"


CHECKS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": _read_lines,
    ".html": lambda path: path.read_text("utf-8").rstrip().endswith("</html>"),
    ".safetensors": _read_safetensors,
}


def _hash(path: Path) -> str:
    if path.suffix == ".html":
        return "a page"  # pages may contain durations; half_written checks that they are complete
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
