"""`yrun doctor` names what is there, what is missing, and what would mend it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yrunner.assembly import probes
from yrunner.assembly.probes import Capability, ask, found, missing
from yrunner.commands.doctor import command
from yrunner.commands.doctor.command import doctor, look_at_machine, look_at_packages
from yrunner.errors import MissingError


def parts(findings: list[Capability], state: str) -> set[str]:
    return {finding.part for finding in findings if finding.state == state}


def test_a_real_machine_is_described_without_importing_torch_itself():
    program = (
        "import sys; sys.argv = ['yrun', 'doctor', '--json']\n"
        "from yrunner.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    answer = json.loads(result.stdout)
    assert answer["ready"] is True
    findings = {(it["group"], it["part"]): it for it in answer["findings"]}
    for place in (
        ("memory", "machine"),
        ("disk", "runs"),
        ("compiler", "ninja"),
        ("devices", "cpu"),
        ("processes", "gloo"),
        ("attention", "sdpa"),
        ("deepspeed", "cpu_adam"),
        ("bitsandbytes", "4 bits"),
    ):
        assert place in findings
    assert all(it["remedy"] for it in answer["findings"] if it["state"] == "missing")


def test_what_yrunner_needs_and_lacks_ends_with_code_3_after_everything_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        found("packages", "rich", "14"),
        missing("packages", "torch", "not installed", remedy="pip install torch", needed=True),
        missing("devices", "gpu", "none", remedy="buy one"),
    ]
    monkeypatch.setattr(command, "examine", lambda *_: findings)
    with pytest.raises(MissingError, match=r"cannot run here: torch\. Pip install torch") as error:
        doctor(as_machine=False)
    assert error.value.exit_code == 3
    out = capsys.readouterr().out
    assert "needed by every recipe:\n  torch: pip install torch" in out
    assert "needed by some recipes:\n  gpu: buy one" in out
    with pytest.raises(MissingError):
        doctor(as_machine=True)
    assert json.loads(capsys.readouterr().out)["ready"] is False


def test_packages_are_compared_with_what_the_project_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for = ["rich>=14,<16", "numpy>=99", "no-such-package>=1", "absent; extra == 'extra-one'"]
    monkeypatch.setattr(command, "requires", lambda _: asked_for)
    monkeypatch.setattr(
        command, "metadata", lambda _: type("M", (), {"get_all": lambda *_: ["extra-one"]})
    )
    findings = {finding.part: finding for finding in look_at_packages()}
    assert findings["rich"].state == "ok"
    assert ">=99 is needed" in findings["numpy"].found
    assert findings["no-such-package"].remedy == "pip install 'no-such-package>=1'"
    assert findings["no-such-package"].needed
    assert findings["absent"].remedy == "pip install 'yrunner[extra-one]'"
    assert not findings["absent"].needed


def test_a_missing_compiler_and_a_ninja_off_the_path_are_told_with_their_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/ninja").touch()
    folders = {"include": str(tmp_path), "scripts": str(tmp_path / "scripts")}
    monkeypatch.setattr(command.sysconfig, "get_path", folders.__getitem__)
    findings = [it for it in look_at_machine(tmp_path) if it.group == "compiler"]
    assert parts(findings, "missing") == {"C++", "Python.h", "ninja"}
    remedies = {finding.part: finding.remedy for finding in findings}
    assert remedies["ninja"] == f"source {tmp_path}/scripts/activate"


def test_a_full_disk_and_little_shared_memory_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little = shutil._ntuple_diskusage(total=64 * 10**6, used=0, free=64 * 10**6)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: little)
    findings = list(look_at_machine(tmp_path / "not" / "yet"))
    assert {"shared", "runs"} <= parts(findings, "missing")
    shared = next(finding for finding in findings if finding.part == "shared")
    assert "--shm-size" in shared.remedy


def test_a_probe_that_crashes_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    [crashed] = ask("no such probe")
    assert (crashed.state, crashed.found) == ("missing", "KeyError: 'no such probe'")
    [late] = ask("hub", seconds=0.001)
    assert late.found == "no answer within 0.001 seconds"
    assert not late.needed


def test_a_hub_out_of_reach_is_told_and_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    [finding] = probes.look_at_hub()
    assert (finding.state, finding.needed) == ("missing", False)
    assert "cannot be reached" in finding.found
