"""No library reports that it is used."""

import os
import subprocess
import sys

import pytest

from yrunner.process import TELEMETRY_SWITCHES, disable_telemetry


def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    for name in TELEMETRY_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    disable_telemetry()
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_the_command_line_switches_it_off_before_the_hubs_client_looks():
    program = (
        "import sys; from yrunner.cli import main; sys.argv = ['yrun', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "from huggingface_hub import constants\n"
        "assert constants.HF_HUB_DISABLE_TELEMETRY"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
