"""Run every command without a network, on data that tries to inject scripts into the pages.

Prints a JSON object with the attempted connections and the exit code of each command.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.project import row, write_project

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
ROWS = "rows <script>alert(1)<script>.jsonl"
COMMANDS = (
    ("train", "tuned.yaml"),
    ("sort", "tuned.yaml"),
    ("eval", "tuned.yaml"),
    ("merge", "tuned.yaml"),
    ("inspect", "tuned.yaml", "--html"),
    ("check", "tuned.yaml", "--html"),
)
CONNECTING = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
"""Audit events of network access."""


def write_hostile_project(folder: Path) -> None:
    """Write the campaign's project with scripts in rows, system prompt and file names."""
    write_project(folder)
    rows = [row(number) for number in range(24)]
    for hostile in rows[::3]:
        hostile["instruction"] += ATTACK
        hostile["output"] = f"{ATTACK} {hostile['output']}"
    lines = [json.dumps(content) + "\n" for content in rows]
    (folder / ROWS).write_text("".join(lines), "utf-8")
    (folder / "test.jsonl").write_text("".join(lines[:4]), "utf-8")
    for name in ("base", "tuned"):
        path = folder / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text("utf-8"))
        recipe["data"] |= {"train": [{"file": ROWS}], "system": ATTACK}
        path.write_text(yaml.safe_dump(recipe), "utf-8")


def main() -> None:
    """Run the commands in the current folder."""
    attempts: list[str] = []

    def refuse(event: str, details: tuple[Any, ...]) -> None:
        if event in CONNECTING:
            attempts.append(f"{event} {details}")
            raise OSError("network access is blocked")

    sys.addaudithook(refuse)
    write_hostile_project(Path("project"))
    endings = {}
    for command in COMMANDS:
        endings[" ".join(command)] = _run(command)
    from huggingface_hub import constants

    telemetry = not constants.HF_HUB_DISABLE_TELEMETRY
    sys.stdout.write(
        json.dumps({"attempts": attempts, "endings": endings, "telemetry": telemetry}) + "\n"
    )


def _run(command: tuple[str, ...]) -> int:
    from yrunner.cli import main as yrun

    sys.argv = ["yrun", *command]
    before = Path.cwd()
    os.chdir("project")
    try:
        yrun()
    except SystemExit as ending:
        return int(ending.code or 0)
    finally:
        os.chdir(before)
    return 0


if __name__ == "__main__":
    main()
