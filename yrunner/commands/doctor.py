"""`yrun doctor`: what this machine can run, and the commands that add what it lacks."""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yrunner.commands.doctor_finding import Finding, missing, still_needed
from yrunner.commands.doctor_machine import look_at_machine
from yrunner.commands.doctor_packages import look_at_packages
from yrunner.console import print_table, progress, say
from yrunner.errors import MissingError

PROBED = ("torch", "deepspeed", "bitsandbytes", "hub")
"""What is asked in processes of their own, see doctor_probes.py."""
SECONDS_TO_ANSWER = 180.0
"""A cold start of torch takes half a minute from a slow disk, and longer on a busy machine."""


def doctor(*, as_machine: bool) -> None:
    """Look at this machine and print every finding, or one JSON object.

    Raises `MissingError` where something is missing that yrunner itself needs.
    """
    findings = examine(Path.cwd(), PROBED)
    needed = still_needed(findings)
    if as_machine:
        content = {"ready": not needed, "findings": [asdict(finding) for finding in findings]}
        say(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _print(findings)
    if needed:
        names = ", ".join(finding.part for finding in needed)
        raise MissingError(
            f"yrunner cannot run here: {names}",
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in needed)),
        )


def examine(folder: Path, probed: Sequence[str]) -> list[Finding]:
    """Everything that can be found out here; runs would be written below `folder`."""
    with (
        progress("looking at this machine", len(probed)) as advance,
        ThreadPoolExecutor(len(probed)) as pool,
    ):
        asked = {name: pool.submit(ask, name) for name in probed}
        findings = [*look_at_packages(), *look_at_machine(folder)]
        for _ in as_completed(asked.values()):
            advance(1)
    return [*findings, *(finding for name in probed for finding in asked[name].result())]


def ask(probe: str, seconds: float = SECONDS_TO_ANSWER) -> list[Finding]:
    """What a probe found in its own process; that it failed is a finding too."""
    command = [sys.executable, "-m", "yrunner.commands.doctor_probes", probe]
    # Only torch is needed by everyone.
    needed = probe == "torch"
    remedy = "pip install --force-reinstall 'yrunner[deepspeed,qlora]'"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"did not answer within {seconds:g} seconds"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        why = lines[-1] if lines else f"ended with code {result.returncode}"
        return [missing(probe, probe, why, remedy=remedy, needed=needed)]
    # Libraries print what they like before.
    answer: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return [Finding(**finding) for finding in answer]


def _print(findings: Sequence[Finding]) -> None:
    rows = [(it.group, it.part, it.state, it.found) for it in findings]
    print_table("This machine", ("", "part", "state", "found"), rows)
    for needed, title in (
        (True, "yrunner needs this:"),
        (False, "only some recipes need this:"),
    ):
        lines = [
            f"  {finding.part}: {finding.remedy}"
            for finding in findings
            if finding.state == "missing" and finding.needed == needed
        ]
        if lines:
            say("\n".join([title, *lines]))
    if not still_needed(findings):
        say("yrunner can train here")
