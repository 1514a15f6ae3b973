"""Nobody is told that yrunner runs: what libraries would report by themselves is switched off."""

import os

SWITCHES = {
    "DO_NOT_TRACK": "1",  # the common sign; the Hub's client and others look at it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Environment variables that the libraries read when they are imported; none changes a result."""


def switch_off_telemetry() -> None:
    """Do so for this process and for those that it starts; what a person has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
