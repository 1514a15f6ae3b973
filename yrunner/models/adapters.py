"""Saved adapters: find one, attach it to its base completely or not at all, merge it."""

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from yrunner.console import counted
from yrunner.errors import ModelError
from yrunner.losses.vocabulary_layers import base_embeddings, base_head, is_tied
from yrunner.models.errors import check_weight_files, silence_libraries
from yrunner.models.hub import only_cached

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def _may_have_quantized_layers() -> bool:
    """Whether any model in this process can have layers of bitsandbytes."""
    return "bitsandbytes" in sys.modules


# With these, peft asks before it compares a layer with those of bitsandbytes. Its own answer is
# whether the package is installed, and then it is imported, which takes seconds.
lora_model.is_bnb_available = lora_model.is_bnb_4bit_available = _may_have_quantized_layers


def find_adapter(source: str) -> Path | None:
    """The folder of the adapter in `source`, a folder or a Hub id; None if it holds none.

    An adapter on the Hub is downloaded, but only safetensors: pickled weights can run code.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder if (folder / CONFIG_FILE).is_file() else None
    if find_adapter_config_file(source, local_files_only=only_cached(source)) is None:
        return None
    wanted = [CONFIG_FILE, WEIGHTS_FILE, "generation_config.json"]
    return Path(
        snapshot_download(source, allow_patterns=wanted, local_files_only=only_cached(source))
    )


def read_base(adapter: Path) -> str:
    """The folder or Hub id of the model that the adapter was trained on."""
    try:
        config = json.loads((adapter / CONFIG_FILE).read_text("utf-8"))
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{adapter / CONFIG_FILE} does not say which base the adapter belongs to",
            remedy="add base_model_name_or_path to it",
        ) from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{adapter / CONFIG_FILE} names no base", remedy="add base_model_name_or_path to it"
        )
    if Path(base).is_dir() and Path(base).resolve() == adapter.resolve():
        raise ModelError(
            f"the adapter {adapter} names itself as its base",
            remedy="correct base_model_name_or_path in its adapter_config.json",
        )
    return base


def attach_adapter(
    model: PreTrainedModel | PeftModel, adapter: Path, *, trainable: bool, name: str = "default"
) -> PeftModel:
    """Attach a saved LoRA adapter to its base, in place. Adapter weights: float32.

    If the base has adapters already, it is added under another `name`. peft loads what fits and
    only warns of the rest, so an adapter of another base would be half random. Here the weights of
    file and model must match exactly.

    Raises ModelError for pickled or damaged weights and for an adapter that does not fit `model`.
    """
    saved_names = set(weight_shapes(adapter))
    resize_vocabulary(model, adapter)
    with silence_libraries():
        try:
            if isinstance(model, PeftModel):
                tuned = model
                tuned.load_adapter(str(adapter), name, is_trainable=trainable)
            else:
                tuned = PeftModel.from_pretrained(model, str(adapter), name, is_trainable=trainable)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _misfit(adapter, str(error).strip().splitlines()[-1].strip()) from error
    if any(config.is_prompt_learning for config in tuned.peft_config.values()):
        raise ModelError(
            f"the adapter {adapter} is a learned prompt, which cannot be merged or continued",
            remedy="use a LoRA adapter",
        )
    expected_names = set(
        get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
    )
    # Full weights of the base, such as resized embeddings, have been loaded too.
    unknown = saved_names - expected_names - set(tuned.state_dict())
    mismatched = sorted(unknown | (expected_names - saved_names))
    if mismatched:
        number = counted(len(mismatched), "weight")
        raise _misfit(adapter, f"it differs in {number}, such as {mismatched[0]}")
    return tuned


def resize_vocabulary(model: PreTrainedModel | PeftModel, adapter: Path) -> None:
    """Resize the embeddings of `model` to those in the adapter's file, if it has any."""
    embeddings = base_embeddings(model)
    shapes = {base_name(name): shape for name, shape in weight_shapes(adapter).items()}
    for name, module in model.named_modules():
        shape = shapes.get(f"{name}.weight")
        if module is embeddings and shape is not None and shape[0] != embeddings.num_embeddings:
            model.resize_token_embeddings(shape[0], mean_resizing=False)
            return


def base_name(name: str) -> str:
    """The name in the base of a full weight in an adapter's file."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the weights of its base, in the base's dtype, and return the base.

    If output head and embeddings are tied and one of them has an adapter, they are untied first:
    otherwise the other would change too.

    Raises ModelError if the adapter has values that are not finite.
    """
    _untie_adapted_head(model.get_base_model())
    with silence_libraries():
        try:
            return model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"the adapter cannot be merged ({str(error).rstrip('.')})",
                remedy="train it again with a lower learning rate",
            ) from error


def _untie_adapted_head(model: PreTrainedModel) -> None:
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    if is_tied(model) and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        untie(model, base_head(model))


def untie(model: PreTrainedModel, head: Any) -> None:
    """Give the output head a weight separate from the embeddings."""
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    untie_config(model.config)


def untie_config(config: Any) -> None:
    """Say in the config that head and embeddings are not tied."""
    config.get_text_config().tie_word_embeddings = False
    config.tie_word_embeddings = False


def weight_shapes(adapter: Path) -> dict[str, list[int]]:
    """The shape of every weight in an adapter's file, by its name there.

    Raises ModelError for pickled or damaged weights.
    """
    path = adapter / WEIGHTS_FILE
    if not path.is_file():
        raise ModelError(
            f"the adapter {adapter} has no {WEIGHTS_FILE}",
            remedy="pickled weights (.bin) can run code and are not read; save it as safetensors",
        )
    check_weight_files(adapter)
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    except SafetensorError as error:
        raise ModelError(
            f"{path} is damaged ({error})", remedy="save or download the adapter again"
        ) from error


def _misfit(adapter: Path, reason: str) -> ModelError:
    return ModelError(
        f"the adapter {adapter} does not fit this base ({reason.rstrip('.')})",
        remedy="use the base that its adapter_config.json names",
    )
