"""Run a model with only one module's weights in memory at a time, with or without an adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from yrunner.models.errors import explain_failure, silence_libraries


class Read(Protocol):
    """Reads a weight by its name in the model, in its own dtype or another."""

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class StreamedModel:
    """A model whose weights are placeholders that hold NaN.

    A module that runs without its weights therefore returns NaN.
    """

    model: Any
    """In float32 and evaluation mode; an adapter may be attached to it."""
    names: Mapping[int, str]
    """The name of every weight in the model's files, by the id of its parameter."""
    modules: Mapping[int, str]
    """The name of every module of the model, by its id."""

    def absent(self, parameter: Tensor) -> bool:
        """Whether a weight is a placeholder; those of an adapter are not."""
        return id(parameter) in self.names and is_placeholder(parameter)

    @contextmanager
    def filled(self, module: nn.Module, read: Read) -> Iterator[None]:
        """Read the module's own weights for the `with` block; afterwards restore the placeholders.

        The block may change them, also those that were no placeholders.
        """
        before = [(weight, weight.data) for weight in module.parameters(recurse=False)]
        try:
            for weight, data in before:
                weight.data = (
                    read(self.names[id(weight)], torch.float32)
                    if self.absent(weight)
                    else data.clone()
                )
            yield
        finally:
            for weight, data in before:
                weight.data = data

    @contextmanager
    def streaming(self, read: Read, advance: Callable[[int], None]) -> Iterator[None]:
        """In the block, every module reads its weights before it runs and drops them afterwards.

        `advance` is called with 1 for each module.
        """
        handles = []
        for module, owner in self.owners():
            handles += _hook(module, partial(self.filled, owner, read), advance)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def owners(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a module that needs weights and the module that owns them.

        They differ under an adapter layer, which reads the weights of its base layer directly.
        """
        pairs = []
        beneath_adapters = set()
        for module in self.model.modules():
            owner = module
            if isinstance(module, BaseTunerLayer):
                owner = module.get_base_layer()
                beneath_adapters.add(id(owner))
            elif id(module) in beneath_adapters:
                continue
            if any(self.absent(weight) for weight in owner.parameters(recurse=False)):
                pairs.append((module, owner))
        return pairs


def build_streamed_model(
    config: PreTrainedConfig,
    *,
    prepare: Callable[[Any], None] = lambda _model: None,
    kept: frozenset[str] = frozenset(),
    trust_remote_code: bool = False,
) -> StreamedModel:
    """The streamed form of a causal language model.

    `prepare` may change the model before its weights are named. The weights `kept` are allocated in
    full, because an adapter attached later brings them.
    """
    # Buffers are real: the files do not hold those that are computed, such as rotary frequencies.
    with silence_libraries(), init_empty_weights(include_buffers=False):
        with explain_failure(config.name_or_path or config.model_type):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    with silence_libraries():
        model.tie_weights()
        prepare(model)
    _replace_weights(model, kept)
    names = {id(weight): name for name, weight in model.named_parameters()}
    modules = {id(module): name for name, module in model.named_modules()}
    return StreamedModel(model.eval(), names, modules)


def is_placeholder(weight: Tensor) -> bool:
    """Whether a tensor has one number for all."""
    return weight.numel() > 1 and not any(weight.stride())


def _replace_weights(model: nn.Module, kept: frozenset[str]) -> None:
    """Put placeholders in the place of all weights but `kept`; what is shared stays shared."""
    # Every weight under all of its names: a head that is tied may be the one to be kept.
    named = list(model.named_parameters(remove_duplicate=False))
    whole = {id(weight) for name, weight in named if name in kept}
    replaced: dict[int, nn.Parameter] = {}
    for _, weight in named:
        data = _placeholder(weight.shape)
        replaced[id(weight)] = nn.Parameter(
            data.clone() if id(weight) in whole else data, requires_grad=False
        )
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, replaced[id(weight)])


def _placeholder(shape: torch.Size) -> Tensor:
    return torch.full((), torch.nan).expand(shape)


def _hook(
    module: nn.Module,
    fill: Callable[[], AbstractContextManager[None]],
    advance: Callable[[int], None],
) -> list[Any]:
    """Open `fill` before the module's forward and close it behind."""
    open_now = ExitStack()

    def before(_module: nn.Module, _inputs: Any) -> None:
        open_now.enter_context(fill())

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        open_now.close()
        advance(1)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
