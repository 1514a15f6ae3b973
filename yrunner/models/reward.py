"""From a language model with a score beside it to a classifier of transformers."""

import copy
from typing import Any

import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from yrunner.errors import ModelError
from yrunner.losses.score_head import SCORE
from yrunner.models.adapters import merge_adapter
from yrunner.models.errors import silence_libraries
from yrunner.models.load import without_zero3
from yrunner.models.quantization import dequantize, without_quantization

Weights = dict[str, Tensor]


def check_classifier(config: Any) -> None:
    """Raise `ModelError` if transformers has no classifier for this kind of model."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no ForSequenceClassification for {config.model_type} models, so no "
            "reward model can be made of the base",
            remedy="choose another base, such as Qwen3",
        )


def as_classifier(
    model: Any, pad_token_id: int, dtype: torch.dtype, weights: Weights | None = None
) -> tuple[Any, Weights | None]:
    """The classifier with one label, of the same weights; an adapter is merged into them.

    It scores the last token that is not `pad_token_id`, as in training. `dtype`: of quantized
    weights, once they are plain. `weights`: those by name that the model does not hold itself; with
    an adapter, the trained ones. Returned with the classifier: all of its weights, or None if it
    holds them.
    """
    if isinstance(model, PeftModel):
        model, weights = _merged(model, dtype, weights or {}), None
    config = without_quantization(copy.deepcopy(model.config))
    config.num_labels = 1
    config.pad_token_id = pad_token_id
    # With it, this process would wait for the others, which build nothing.
    with without_zero3(), torch.device("meta"):
        classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    setattr(classifier, SCORE, getattr(model, SCORE))
    classifier.name_or_path = model.name_or_path
    if weights is not None:
        # The head of the language model is left out.
        weights = {name: weights[name] for name in classifier.state_dict()}
    return classifier.eval(), weights


def _merged(model: PeftModel, dtype: torch.dtype, weights: Weights) -> Any:
    """The base with the adapter in its weights, which are plain ones in `dtype` from then on."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].to(parameter.device)
    if getattr(model.get_base_model(), "is_quantized", False):
        state, config = get_peft_model_state_dict(model), model.peft_config[model.active_adapter]
        with silence_libraries():
            # Quantizing again what is merged would round the adapter away.
            model = get_peft_model(dequantize(model.unload(), dtype), config)
            set_peft_model_state_dict(model, state)
    return merge_adapter(model)
