"""A score beside a language model: of a whole answer, or by a critic at each of its tokens.

While it is trained, the model stays a language model with one more layer, so that everything that
is known about those (isolation of packed rows, adapters, quantization) holds. A critic beside a
LoRA adapter is a second adapter on the same frozen base.
"""

# B = rows, T = tokens, D = hidden size, S = answers, N = targets

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from yrunner.errors import ModelError
from yrunner.losses.targets import at_least_float32, target_places

SCORE = "score"
"""The name of the layer, as in the classifiers of transformers."""
CRITIC = "critic"
"""The name of a critic's layer, and of its adapter."""


def add_score_head(model: Any) -> None:
    """Add a layer of random weights, drawn from torch's global generator; see `_one_output`."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    head, whole = _one_output(model)
    with whole:
        nn.init.normal_(head.weight, std=std)
    model.add_module(SCORE, head)


def _one_output(model: Any) -> tuple[nn.Linear, AbstractContextManager[Any]]:
    """A layer from hidden states to one number, and a context in which its weights can be set.

    In float32; under ZeRO-3 sharded like the other weights, and in their dtype.
    """
    size = model.config.get_text_config().hidden_size
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
            head = nn.Linear(size, 1, bias=False)
        return head, deepspeed.zero.GatheredParameters(head.weight, modifier_rank=0)
    device = next(model.parameters()).device
    return nn.Linear(size, 1, bias=False, dtype=torch.float32, device=device), nullcontext()


def attach_scores(model: Any) -> None:
    """Patch `forward` to return `score_S` for `score_at=...`; other calls go to the model's own.

    `score_at`: the place of each answer's end among all tokens of a batch, counted row by row.
    """
    causal = _causal(model)
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


def add_critic(model: Any, start_1D: Tensor | None = None) -> None:
    """Add a critic to a model that is ready to be trained; its values start at 0.

    `start_1D`: the weights of its layer instead of zeros. With an adapter, a second one of the same
    shape, whose random half is drawn from torch's global generator; one that was added before,
    named CRITIC, is kept. Raises `ModelError` if the model's adapter is on the output head alone,
    which no value reads.
    """
    causal = _causal(model)
    if isinstance(model, PeftModel) and CRITIC not in model.peft_config:
        with same_weights_trained(model):
            model.add_adapter(CRITIC, _critic_config(model, causal))
    head, whole = _one_output(causal)
    with whole, torch.no_grad():
        head.weight.copy_(torch.zeros_like(head.weight) if start_1D is None else start_1D)
    causal.add_module(CRITIC, head)
    train_critic(model)


def _critic_config(model: PeftModel, causal: Any) -> Any:
    """The shape of the model's adapter, without what only a policy can use."""
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.modules_to_save = config.trainable_token_indices = config.exclude_modules = None
    config.inference_mode = False
    head = causal.get_output_embeddings()
    heads = {name for name, module in causal.named_modules() if module is head}
    if not isinstance(config.target_modules, str):
        leaves = {name.rpartition(".")[2] for name in heads}
        config.target_modules = set(config.target_modules) - heads - leaves
    if not config.target_modules:
        raise ModelError(
            "the adapter is on the output head alone, and a critic reads the layers before it",
            remedy="set tuning.targets to all-linear",
        )
    return config


@contextmanager
def same_weights_trained(model: Any) -> Iterator[None]:
    """Restore afterwards which weights are trained: peft changes it with every switch."""
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.requires_grad_(id(weight) in trained)


def train_critic(model: Any) -> None:
    """Let the critic's weights be trained, whichever adapter is active."""
    for weight in critic_weights(model).values():
        weight.requires_grad_(True)


def critic_weights(model: Any) -> dict[str, nn.Parameter]:
    """The weights of the critic by name; none without one."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if CRITIC in name.split(".")}


@contextmanager
def critic_apart(model: Any) -> Iterator[None]:
    """Take the critic's layer off the model in the block, which saves the model alone."""
    modules = _causal(model)._modules
    head = modules.pop(CRITIC, None)
    try:
        yield
    finally:
        if head is not None:
            modules[CRITIC] = head


def has_adapter(model: Any, name: str) -> bool:
    """Whether any layer of the model has an adapter of this name."""
    return any(name in layer._get_available_adapters() for layer in _tuner_layers(model))


@contextmanager
def adapter_active(model: Any, name: str) -> Iterator[None]:
    """Compute with another of the model's adapters in the block."""
    # Not `set_adapter`: that also freezes the other adapters, which are being trained.
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [it for it in model.modules() if isinstance(it, kinds)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name] if name in layer._get_available_adapters() else []
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def same_adapter_again(
    model: Any,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """For torch's checkpoint, which computes layers again when another adapter may be active."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        active = (name for layer in _tuner_layers(model) for name in layer.active_adapters)
        name = next(active, None)
        again = nullcontext() if name is None else adapter_active(model, name)
        return nullcontext(), again

    return contexts


def target_values(
    causal: Any, inputs: Mapping[str, Any], labels_BT: Tensor, hidden_BTD: Tensor | None
) -> Tensor:
    """What the critic expects before each target is written, shape [N], float32 or wider.

    `hidden_BTD`: the policy's own hidden states, which a critic without an adapter reads.
    """
    if hidden_BTD is None or has_adapter(causal, CRITIC):
        with adapter_active(causal, CRITIC):
            hidden_BTD = causal.base_model(**inputs).last_hidden_state
    head = getattr(causal, CRITIC)
    hidden_ND = hidden_BTD[:, :-1][target_places(labels_BT)[0]].to(head.weight.dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        value_N: Tensor = at_least_float32(head(hidden_ND).squeeze(1))
    return value_N


def _tuner_layers(model: Any) -> Iterator[Any]:
    return (it for it in model.modules() if isinstance(it, BaseTunerLayer))


def _causal(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
