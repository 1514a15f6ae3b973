"""A score beside a language model: one number for an answer, from the hidden state of its end.

While it is trained, the model stays a language model with one more layer, so that everything that
is known about those (isolation of packed rows, adapters, quantization) holds.
"""

# B = rows, T = tokens, D = hidden size, S = answers

from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from yrunner.losses.targets import at_least_float32

SCORE = "score"
"""The name of the layer, as in the classifiers of transformers."""


def add_score_head(model: Any) -> None:
    """Add a layer of random weights, drawn from torch's global generator.

    In float32; under ZeRO-3 sharded like the other weights, and in their dtype.
    """
    config = model.config.get_text_config()
    std = getattr(config, "initializer_range", 0.02)
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
            head = nn.Linear(config.hidden_size, 1, bias=False)
        with deepspeed.zero.GatheredParameters(head.weight, modifier_rank=0):
            nn.init.normal_(head.weight, std=std)
    else:
        head = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(head.weight, std=std)
        head.to(next(model.parameters()).device)
    model.add_module(SCORE, head)


def attach_scores(model: Any) -> None:
    """Patch `forward` to return `score_S` for `score_at=...`; other calls go to the model's own.

    `score_at`: the place of each answer's end among all tokens of a batch, counted row by row.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    original = causal.forward

    @wraps(original)
    def forward(*args: Any, score_at: Tensor | None = None, **kwargs: Any) -> Any:
        if score_at is None:
            return original(*args, **kwargs)
        # PEFT passes every argument of its own forward, given or not.
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        hidden_BTD = causal.base_model(**inputs).last_hidden_state
        head = getattr(causal, SCORE)
        # Float32, unless DeepSpeed computes with rounded weights.
        hidden_SD = hidden_BTD.flatten(0, 1)[score_at].to(next(head.parameters()).dtype)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            return {"score_S": at_least_float32(head(hidden_SD).squeeze(1))}

    causal.forward = forward


def measure_scores(model: Any, inputs: dict[str, Tensor], score_at: Tensor) -> Tensor:
    """The scores of the answers in a batch, shape [S], float32 or wider; `attach_scores` first."""
    wanted = {name: value for name, value in inputs.items() if name != "labels"}
    score_S: Tensor = model(**wanted, score_at=score_at, use_cache=False)["score_S"]
    return score_S
