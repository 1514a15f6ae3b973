"""Build a model with the shapes and dtypes of the real one and none of its memory."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from yrunner.errors import ModelError
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import explain_failure, quiet_libraries
from yrunner.models.hub import only_cached
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import Tuning


def read_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder or Hub id, of an adapter that of its base. No weight is read.

    Raises ModelError for everything that is wrong with the source, and MissingError when a
    package is missing.
    """
    with quiet_libraries(), explain_failure(source):
        adapter = find_adapter(source)
        if adapter is None:
            return AutoConfig.from_pretrained(
                source,
                trust_remote_code=trust_remote_code,
                local_files_only=only_cached(source),
            )
    return read_config(read_base(adapter), trust_remote_code=trust_remote_code)


def build_weightless(
    config: PreTrainedConfig,
    tuning: Tuning,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model of `config`, ready to train as `tuning` says, of fake tensors on the CPU.

    flash_attention_2 needs a GPU; sdpa, which keeps the same tensors, takes its place. Raises
    ModelError for a config of quantized weights, and what `apply_tuning` raises.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the weights of this model are quantized, and quantized weights are not trained here",
            remedy="choose the model that they were made from",
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention != "auto":
        options["attn_implementation"] = attention.replace("flash_attention_2", "sdpa")
    # First meta tensors, on which transformers and peft can build everything, then fake ones on
    # the CPU: only these may meet the real tensors of a batch.
    with quiet_libraries(), torch.device("meta"):
        with explain_failure(config.name_or_path or config.model_type):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        tuned = apply_tuning(model, tuning)
    # No fallback: it would fill real tensors of the same size for operations that it cannot fake.
    with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False):
        tuned.to_empty(device="cpu")
        model.tie_weights()  # `to_empty` goes from module to module and parts what was shared
    return tuned


def fake_mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode that the tensors of a weightless model belong to."""
    weight = next(model.parameters())
    assert isinstance(weight, FakeTensor), "build_weightless builds the models to trace"
    return weight.fake_mode
