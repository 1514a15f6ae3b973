"""Convert every settings file of checkouts of other tools, and count what becomes of their keys.

    python benchmarks/convert.py FOLDER ... [--show FILE-PART] [--keys]

A folder is a checkout of axolotl, LLaMA-Factory, trl, ms-swift or y-trainer, or has such files.
YAML, JSON, shell and batch files are read, and commands in Markdown and docstrings. Files without
settings of a training are counted and left out. `--keys` prints every key that the
classes of settings in Python files of the folders declare.
"""

import argparse
import ast
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from yrunner.commands.convert.command import convert_settings, recipe_text
from yrunner.commands.convert.conversion import Outcome, leaves
from yrunner.commands.convert.settings import read_settings
from yrunner.errors import YRunnerError

SCRIPTS = (".sh", ".bat", ".yaml", ".yml", ".json")
DOCUMENTS = (".md", ".py", ".rst", ".txt")
SKIPPED = {".git", "node_modules", "tests", "docker", ".github"}
PROGRAM = r"(?:trl|start_training|swift|scripts/\w+\.py|schedule)"
COMMAND = re.compile(rf"^[^\n]*{PROGRAM}[^\n]*\\+\n(?:[^\n]*\\+[^\n]*\n)*[^\n]*", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--show", help="print recipe and list of files with this in the path")
    parser.add_argument("--keys", action="store_true")
    options = parser.parse_args()
    if options.keys:
        print(" ".join(sorted(declared_keys(options.folders))))
        return
    totals: Counter[tuple[str, str]] = Counter()
    failures = []
    for folder in options.folders:
        os.chdir(folder.resolve())
        with tempfile.TemporaryDirectory() as place:
            for path, shown in settings_files(Path.cwd(), Path(place)):
                failures += examine(path, shown, totals, options.show)
    print_totals(totals, failures)
    sys.exit(bool([line for line in failures if line.startswith("FAILED")]))


def settings_files(folder: Path, place: Path) -> list[tuple[Path, str]]:
    """Files with settings, and commands found in documents, each written to a file in `place`."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if SKIPPED & set(path.parts) or not path.is_file():
            continue
        if path.suffix in SCRIPTS:
            found.append((path, name))
        elif path.suffix in DOCUMENTS:
            text = path.read_text("utf-8", errors="replace")
            for number, match in enumerate(COMMAND.finditer(text)):
                command = place / f"{path.stem}-{len(found)}.sh"
                command.write_text(
                    re.sub(r"\\{2}$", r"\\", match.group(), flags=re.MULTILINE), "utf-8"
                )
                found.append((command, f"{name} command {number + 1}"))
    return found


def examine(path: Path, shown: str, totals: Counter, show: str | None) -> list[str]:
    """Convert one file, add to `totals`, and return what went wrong."""
    try:
        settings = read_settings(path, None)
    except YRunnerError as error:
        totals["", "no settings of a training"] += 1
        return [f"left out {shown}: {str(error).splitlines()[0][:150]}"] if show else []
    tool = settings.tool
    totals[tool, "files"] += 1
    try:
        c, _ = convert_settings(path, tool=tool, recipe_folder=path.parent)
    except YRunnerError as error:
        return [f"FAILED {shown}: {error}"]
    keys = Counter(key for name, value in settings.keys.items() for key, _ in leaves(name, value))
    listed = Counter(entry.key for entry in c.entries if not entry.key.startswith("dataset_info."))
    wrong = [key for key in keys | listed if keys[key] != listed[key]]
    problems = [f"FAILED {shown}: {key} is listed {listed[key]} times" for key in wrong]
    totals[tool, "keys"] += sum(listed.values())
    for entry in c.entries:
        totals[tool, entry.outcome.value] += 1
    try:
        text = recipe_text(c, path, [], output=path.with_suffix(".recipe.yaml"), allow_missing=True)
        totals[tool, "recipes"] += 1
    except YRunnerError as error:
        text = ""
        kind = "no recipe" if "o recipe is written" in str(error) else "FAILED"
        problems.append(f"{kind} {shown}: {error}")
    if show and show in shown:
        print(f"\n== {shown}\n{text}")
        for entry in c.entries:
            where = f"{entry.value} -> {entry.place} ({entry.note})"
            print(f"  {entry.outcome.value}: {entry.key}: {where}")
    return problems


def print_totals(totals: Counter, failures: list[str]) -> None:
    """A line per tool, then every file that did not become a recipe."""
    columns = ("files", "recipes", "keys", *(outcome.value for outcome in Outcome))
    print(f"{'':14}" + "".join(f"{column[:18]:>20}" for column in columns))
    for tool in sorted({tool for tool, _ in totals if tool}):
        print(f"{tool:14}" + "".join(f"{totals[tool, column]:>20,}" for column in columns))
    print(f"left out, as no settings of a training: {totals['', 'no settings of a training']:,}")
    for line in failures:
        print(line)


def declared_keys(folders: list[Path]) -> set[str]:
    """Fields of the classes in Python files, and options of argparse."""
    found = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text("utf-8", errors="replace")
        found |= set(re.findall(r"add_argument\(\s*[\"']--(\w+)", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                found |= {part.target.id for part in fields if isinstance(part.target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


if __name__ == "__main__":
    main()
