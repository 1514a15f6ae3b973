"""The logits of base and adapters, and of a model's folder, in the memory of one module.

The weights of most models are read as their modules run. Those that transformers changes while it
loads them, such as the experts of a mixture, are loaded as a whole.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from yrunner.console import progress
from yrunner.models.checkpoint import open_checkpoint
from yrunner.models.load import load_model
from yrunner.models.merging import Merge, Weighted, attach_all
from yrunner.models.proof import Probes, logits_at
from yrunner.models.streamed_model import Read, StreamedModel, build_streamed_model
from yrunner.models.weightless import read_config


def merge_logits(
    merge: Merge, adapters: Sequence[Weighted], probes: Probes, *, trust_remote_code: bool
) -> Tensor:
    """What base and adapters answer, shape [N, V]."""
    what = "proof, base and adapter"
    if merge.can_stream:
        return _streamed(merge.streamed, merge.read, probes, what)
    base = load_model(
        str(merge.base.folder), dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return logits_at(attach_all(base, adapters), probes)


def folder_logits(folder: Path, probes: Probes, *, trust_remote_code: bool) -> Tensor:
    """What the model in a folder answers, shape [N, V]."""
    checkpoint = open_checkpoint(str(folder))
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    streamed = build_streamed_model(config, trust_remote_code=trust_remote_code)
    if set(streamed.names.values()) <= checkpoint.sizes.keys():
        return _streamed(streamed, checkpoint.read, probes, "proof, merged model")
    model = load_model(str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code)
    return logits_at(model, probes)


def _streamed(streamed: StreamedModel, read: Read, probes: Probes, what: str) -> Tensor:
    with progress(what, len(streamed.owners())) as advance:
        with streamed.streaming(read, advance):
            return logits_at(streamed.model, probes)
