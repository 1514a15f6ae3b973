"""No command connects to the network, writes a secret, or lets data inject scripts into a page."""

import html
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hostile_world import ATTACK, COMMANDS

SECRETS = {
    "HF_TOKEN": "hf_S3cretS3cretS3cretS3cretS3cretS3",
    "HUGGING_FACE_HUB_TOKEN": "hf_0therS3cret0therS3cret0therS3c",
    "WANDB_API_KEY": "wandb-S3cret-40-characters-0123456789abcd",
    "SWANLAB_API_KEY": "swanlab-S3cret",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-S3cret",
    "AWS_SECRET_ACCESS_KEY": "aws-S3cret",
    "OPENAI_API_KEY": "sk-S3cret",
}
PAGES = ("report.html", "sort/report.html", "eval.html")


@dataclass(frozen=True)
class World:
    """What the commands left behind."""

    project: Path
    printed: str
    seen: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    root = Path(__file__).parents[2]
    # HF_HUB_OFFLINE would hide connection attempts.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile_world"],
        cwd=folder,
        env=kept | SECRETS | {"PYTHONPATH": str(root), "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *printed, seen = result.stdout.splitlines()
    return World(folder / "project", "\n".join([*printed, result.stderr]), json.loads(seen))


def test_every_command_succeeds_without_a_connection(world: World):
    assert world.seen["endings"] == {" ".join(command): 0 for command in COMMANDS}, world.printed
    assert world.seen["attempts"] == []


def test_no_library_sends_telemetry(world: World):
    assert world.seen["telemetry"] is False


def test_no_secret_of_the_environment_is_printed_or_written(world: World):
    files = [path for path in world.project.rglob("*") if path.is_file()]
    assert len(files) > 40
    for secret in SECRETS.values():
        assert secret not in world.printed
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_texts_of_data_and_models_stay_text_on_every_page(world: World):
    pages = sorted(world.project.rglob("*.html"))
    tuned = world.project / "outputs/tuned"
    assert {tuned / page for page in PAGES} < {*pages}
    assert len(pages) >= 6, "the base's report, three of the run, and two next to it"
    for page in pages:
        text = page.read_text("utf-8")
        assert "<script>document" not in text
        assert "<script>alert" not in text
        assert "<img" not in text
        assert "default-src 'none'" in text
        # Every script element is one of ours: listed by its hash, or JSON data.
        for opening in re.findall(r"<script[^>]*>", text):
            assert opening == "<script>" or 'type="application/json"' in opening or "id=" in opening


def test_the_attack_reaches_the_pages_as_text(world: World):
    attacked = [
        page
        for page in world.project.rglob("*.html")
        if "document.title" in html.unescape(page.read_text("utf-8"))
    ]
    assert ATTACK.startswith("</script>")
    assert len(attacked) >= 5
