"""From a language model with a score beside it to a classifier of transformers."""

import copy
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from yrunner.errors import ModelError
from yrunner.losses.score_head import SCORE
from yrunner.models.errors import silence_libraries


def check_classifier(config: Any) -> None:
    """Raise `ModelError` if transformers has no classifier for this kind of model."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no ForSequenceClassification for {config.model_type} models, so no "
            "reward model can be made of the base",
            remedy="choose another base, such as Qwen3",
        )


def as_classifier(model: Any, pad_token_id: int) -> Any:
    """The classifier with one label, of the same weights; an adapter is merged into them.

    It scores the last token that is not `pad_token_id`, as in training.
    """
    if isinstance(model, PeftModel):
        with silence_libraries():
            model = model.merge_and_unload()
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.pad_token_id = pad_token_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    setattr(classifier, SCORE, getattr(model, SCORE))
    classifier.name_or_path = model.name_or_path
    return classifier.eval()
