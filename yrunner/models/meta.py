"""Everything about a model but its weights: its config, and a model of fake tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from yrunner.errors import ModelError
from yrunner.losses.score_head import add_critic
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import explain_failure, silence_libraries
from yrunner.models.hub import only_cached
from yrunner.models.quantization import stored_quantization, without_quantization
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import Tuning

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Keys of a config that are numbers of at least 1 where a model has them."""


def read_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder or Hub id; for an adapter, that of its base.

    How its files are quantized is left out: see `stored_quantization`. Raises ModelError for
    anything wrong with the source, MissingError for a missing package.
    """
    with silence_libraries(), explain_failure(source):
        adapter = find_adapter(source)
        if adapter is None:
            config = AutoConfig.from_pretrained(
                source,
                trust_remote_code=trust_remote_code,
                local_files_only=only_cached(source),
            )
            stored_quantization(source)  # refuses what cannot be read
            _check_sizes(config, source)
            return without_quantization(config)
    return read_config(read_base(adapter), trust_remote_code=trust_remote_code)


def _check_sizes(config: PreTrainedConfig, source: str) -> None:
    """Raise `ModelError` for sizes with which no model can be built."""
    text = config.get_text_config()
    for key in SIZES:
        size = getattr(text, key, 1)
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ModelError(
                f"{source} has a config.json with wrong values ({key}: {size!r})",
                remedy="download or save the model again",
            )


def build_fake_model(
    config: PreTrainedConfig,
    tuning: Tuning,
    *,
    dtype: torch.dtype,
    token_ids: Sequence[int] = (),
    attention: str = "auto",
    trust_remote_code: bool = False,
    critic: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model of `config`, ready to train as `tuning` says, with fake tensors on the CPU.

    They have shapes and dtypes but no memory. flash_attention_2 needs a GPU and is replaced by
    sdpa, which saves the same tensors. Raises what `apply_tuning` raises.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention != "auto":
        options["attn_implementation"] = attention.replace("flash_attention_2", "sdpa")
    # Meta tensors first, because transformers and peft can build everything on them; then fake
    # tensors on the CPU, because only these mix with the real tensors of a batch.
    with silence_libraries(), torch.device("meta"):
        with explain_failure(config.name_or_path or config.model_type):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        tuned = apply_tuning(model, tuning, token_ids)
        if critic:
            add_critic(tuned)
    # No fallback: for unsupported operations it would allocate real tensors of the same size.
    with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False):
        _allocate(tuned)
    return tuned


def _allocate(model: nn.Module) -> None:
    """Put empty tensors on the CPU in place of meta tensors; what is shared stays shared.

    `to_empty` would make a tensor of every name, and transformers' `tie_weights` does not look
    beneath an adapter on the head.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, or their ids would be reused

    def empty(old: Tensor) -> Any:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            made[id(old)] = old, new
        return made[id(old)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = empty(old)


def fake_mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode of a fake model's tensors."""
    weight = next(model.parameters())
    assert isinstance(weight, FakeTensor), "needs a model from build_fake_model"
    return weight.fake_mode
