"""How a process meets the others that train with it."""

import os
import subprocess
import sys
from pathlib import Path

JOIN = """
import os, sys

# As under pytest: DeepSpeed mutes another file than the one that a linker writes to.
sys.stderr = os.fdopen(os.dup(2), "w")
from yrunner.distributed.collectives import join_ranks, leave_ranks

join_ranks(deepspeed=True)
import deepspeed

deepspeed.init_distributed("gloo")
leave_ranks()
"""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def test_deepspeed_joins_without_linking_test_programs(tmp_path: Path):
    """Of one that fails, "collect2: error: ld returned 1" would be the last line on the screen."""
    (compiler := tmp_path / "cc").write_text('#!/bin/sh\necho "collect2: error" >&2\nexit 1\n')
    compiler.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={**os.environ, **ALONE, **PLACE, "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "collect2" not in result.stdout + result.stderr
