"""From a language model with a score beside it to a classifier of transformers, and adapters.

A reward model that was trained as an adapter is also saved as one, with its score: then it can
judge answers, or become a critic, on a base that is in memory already.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from yrunner.errors import ModelError
from yrunner.losses.score_head import CRITIC, SCORE, same_weights_trained
from yrunner.models.adapters import CONFIG_FILE, WEIGHTS_FILE, merge_adapter
from yrunner.models.errors import silence_libraries
from yrunner.models.load import without_zero3
from yrunner.models.quantization import dequantize, without_quantization
from yrunner.storage.run_dir import read_json, whole_folder, write_json

Weights = dict[str, Tensor]
HEAD = f"base_model.model.{SCORE}.weight"
"""The score's name in the file of an adapter."""
ORIGIN = "origin.json"
"""On which base an adapter was trained, and how that was held in memory."""
ADAPTER_FOLDER = "adapter"
"""In the folder of a reward model."""


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


def save_score_adapter(
    model: PeftModel,
    folder: Path,
    origin: Mapping[str, Any],
    *,
    name: str = "default",
    weights: Weights | None = None,
) -> None:
    """Write an adapter with its score: a reward model's, or a critic's by the name CRITIC.

    `weights`: the trained ones by name, if the model does not hold them. `folder` appears, or is
    replaced, only when it is complete.
    """
    named = _weights_of(model, name)
    if name == CRITIC:
        full = f"base_model.model.{CRITIC}.weight"
        named[HEAD] = full, model.get_parameter(full)
    known = weights or {}
    state = {key: known.get(full, weight) for key, (full, weight) in named.items()}
    config = _plain_config(model.peft_config[name])
    config.base_model_name_or_path = model.get_base_model().name_or_path
    whole = {key: weight.detach().cpu().contiguous() for key, weight in state.items()}
    with whole_folder(folder) as partial:
        config.save_pretrained(str(partial))
        save_file(whole, partial / WEIGHTS_FILE)
        write_json(partial / ORIGIN, dict(origin))


def find_score_adapter(folder: Path) -> Path | None:
    """The adapter with a score that a folder is or holds; None without one."""
    places = (folder, folder / ADAPTER_FOLDER)
    return next((place for place in places if (place / ORIGIN).is_file()), None)


def read_origin_of(adapter: Path) -> dict[str, Any]:
    """What `save_score_adapter` was given as the origin."""
    origin: dict[str, Any] = read_json(adapter / ORIGIN)
    return origin


def add_score_adapter(model: PeftModel, adapter: Path, name: str) -> Tensor:
    """Add a saved adapter under a name, frozen and inactive; returns its score, shape [1, D].

    Raises `ModelError` if it does not fit the model.
    """
    state = load_file(adapter / WEIGHTS_FILE)
    head = state.pop(HEAD, None)
    with silence_libraries(), same_weights_trained(model):
        model.add_adapter(name, _plain_config(LoraConfig.from_pretrained(str(adapter))))
    own = {key: weight for key, (_, weight) in _weights_of(model, name).items()}
    shapes = {key: weight.shape for key, weight in own.items()}
    if head is None or shapes != {key: weight.shape for key, weight in state.items()}:
        raise ModelError(
            f"the adapter {adapter} does not fit this base",
            remedy=f"train it again; its {CONFIG_FILE} names its base",
        )
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(state[key])
    return head


def _weights_of(model: PeftModel, name: str) -> dict[str, tuple[str, Tensor]]:
    """The weights of an adapter by their names without its own, each with its full name.

    Not by peft, which looks for every adapter in tokens that only one of them trains.
    """
    layer = getattr(model.get_base_model(), CRITIC, None)
    found = {}
    for full, weight in model.named_parameters():
        parts = full.split(".")
        # The layer of a critic has the name of its adapter.
        if name in parts and (layer is None or weight is not layer.weight):
            key = ".".join(part for part in parts if part != name)
            found[HEAD if f".{SCORE}." in full else key] = (full, weight)
    return found


def _plain_config(config: Any) -> Any:
    """The shape of an adapter without its score, which is kept apart."""
    plain = copy.deepcopy(config)
    plain.modules_to_save = plain.exclude_modules = None
    plain.inference_mode = False
    return plain
