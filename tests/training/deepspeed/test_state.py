"""The optimizer's memory on a disk: two processes train, save, and go on as if never stopped."""

from pathlib import Path

import pytest
import torch

from benchmarks.processes import run_together
from benchmarks.ranks.cases import SHARINGS, Case, write_base
from benchmarks.ranks.training import train_case, train_together
from yrunner.assembly.probes import ask
from yrunner.recipe.schema.distributed import DeepSpeedSection
from yrunner.training.deepspeed import config as deepspeed_settings

CASE = Case("nvme", "nlirg", "packed", "full")
WIDER = 16
"""What is smaller than a megabyte DeepSpeed leaves in memory."""
NUMBERS_AT_ONCE = 600_000
"""So that there are several groups of weights."""
UPDATE = 3
"""After it there is a checkpoint."""


def train_and_go_on(rank: int, folder: Path) -> None:
    """The weights of a whole training, and of one that goes on from its checkpoint."""
    SHARINGS["nvme"] = DeepSpeedSection(stage=3, offload="nvme", nvme_folder=folder / "disk")
    deepspeed_settings.NUMBERS_AT_ONCE = NUMBERS_AT_ONCE
    whole = train_together(CASE, folder)
    resumed = train_together(CASE, folder, resume_at=UPDATE)
    if rank == 0:
        torch.save((whole, resumed), folder / "found.pt")


@pytest.fixture
def built() -> None:
    """Skip where the operation would have to be compiled, which takes minutes."""
    findings = {finding.part: finding.found for finding in ask("deepspeed")}
    if findings.get("async_io") != "built":
        pytest.skip("DeepSpeed's async_io is not built here; its first use compiles it")


@pytest.mark.usefixtures("built")
def test_a_run_whose_optimizer_lies_on_a_disk_learns_the_same_and_goes_on(tmp_path: Path):
    write_base(tmp_path / "base", times=WIDER)
    run_together(train_and_go_on, tmp_path, number=2)
    assert list((tmp_path / "disk").rglob("exp_avg_sq*.swp")), "nothing lay on the disk"
    whole, resumed = torch.load(tmp_path / "found.pt", weights_only=False)
    alone = train_case(CASE.alone, tmp_path)
    assert alone.loss_gap(whole) < 1e-5
    assert alone.weight_gap(whole) < 1e-4
    assert whole.weight_gap(resumed) < 1e-6
