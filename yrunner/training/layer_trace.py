"""The update of a deep model, from those of two short ones that have the same layers.

What an update needs grows by the same amount with every layer, and running all of 80 layers one
operation at a time takes minutes. Whether a model's layers are alike is seen in its weights: the
two short models must predict those of the whole.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from yrunner.errors import ModelError
from yrunner.models.scratch import BUILD_ERRORS
from yrunner.training.memory import StepTrace, Untraceable, trace_step

SHORT, LONGER = 2, 4
"""Layers of the two models that are run."""
WORTH_IT = 8
"""A model with fewer layers is run as it is."""
ALIKE = 0.01
"""How far the predicted weights may be off, as a share of the real ones."""


@dataclass(frozen=True)
class GrownTrace:
    """One update of a model of many layers; the same figures as a `StepTrace`."""

    short: StepTrace
    longer: StepTrace
    layers: int

    @property
    def weights(self) -> int:
        """Parameters and buffers, in bytes."""
        return self._grown(self.short.weights, self.longer.weights)

    @property
    def optimizer(self) -> int:
        """What the optimizer remembers from update to update, in bytes."""
        return self._grown(self.short.optimizer, self.longer.optimizer)

    @property
    def updating(self) -> int:
        """The optimizer's working memory at most, in bytes."""
        return self._grown(self.short.updating, self.longer.updating)

    def busiest_compute(
        self, gradient_share: float = 1.0, *, copies: bool = True
    ) -> tuple[int, int]:
        """Gradients and activations where most is held, of the gradients only that share."""
        shorts = self.short.busiest_compute(gradient_share, copies=copies)
        longs = self.longer.busiest_compute(gradient_share, copies=copies)
        gradients, activations = map(self._grown, shorts, longs)
        return gradients, activations

    def _grown(self, short: int, longer: int) -> int:
        return longer + (longer - short) * (self.layers - LONGER) // (LONGER - SHORT)


def trace_update(
    whole: Any,
    build: Callable[[PreTrainedConfig], Any],
    micro_batch: Mapping[str, Tensor],
    **options: Any,
) -> StepTrace | GrownTrace | Untraceable:
    """One update of a weightless model that is ready to train.

    `build` makes such a model of a config; `options` are those of `trace_step`.
    """
    grown = _trace_short_ones(whole, build, micro_batch, options)
    return trace_step(whole, micro_batch, **options) if grown is None else grown


def _trace_short_ones(
    whole: Any,
    build: Callable[[PreTrainedConfig], Any],
    micro_batch: Mapping[str, Tensor],
    options: dict[str, Any],
) -> GrownTrace | None:
    """None where the short models cannot be built, or say nothing about the whole."""
    text = whole.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if text.num_hidden_layers < WORTH_IT or set(kinds[:SHORT]) != set(kinds):
        return None
    try:
        models = [build(shortened(whole.config, number)) for number in (SHORT, LONGER)]
    except (ModelError, *BUILD_ERRORS):
        return None
    short, longer = (trace_step(model, micro_batch, **options) for model in models)
    if isinstance(short, Untraceable) or isinstance(longer, Untraceable):
        return None
    grown = GrownTrace(short, longer, text.num_hidden_layers)
    real = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))
    return grown if abs(grown.weights - real) <= ALIKE * real else None


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first layers only."""
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short
