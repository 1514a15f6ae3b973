"""A checkpoint from somebody else cannot run code: its pickles are read as data, or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import checkpoint_every


class Planted:
    """Makes a file where it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "rng_state.pth", "pytorch_model.bin"],
)
def test_a_pickle_planted_in_a_checkpoint_never_runs(
    name: str, make_model: Any, examples: Any, make_trainer: Any, tmp_path: Path
):
    settings = dict(batch_size=4, checkpoint=checkpoint_every(1))
    make_trainer(make_model(), examples[:8], **settings).train()
    again = make_trainer(make_model(), examples[:8], **settings)
    checkpoint = again.run_dir.checkpoint(1)
    torch.save(Planted(tmp_path / "owned"), checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    with suppress(Exception):
        again.train(checkpoint)
    assert not (tmp_path / "owned").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "owned").exists(), "it would have run"
