"""Choose which weights of a model are trained, or add an adapter.

Trained weights are float32: bfloat16's 8 bits would lose a step of 1e-5. Frozen weights stay in the
model's dtype. A model of mixed dtypes (`freeze` with bfloat16) runs under autocast.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, assert_never

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from yrunner.errors import ModelError
from yrunner.losses.score_head import SCORE
from yrunner.losses.vocabulary_layers import base_embeddings, base_head, is_tied
from yrunner.models.adapters import CONFIG_FILE, attach_adapter, read_base
from yrunner.models.errors import silence_libraries
from yrunner.models.limits import check_purpose
from yrunner.models.quantization import (
    StoredQuantization,
    prevent_repacking,
    stored_quantization,
)
from yrunner.recipe.schema.model import (
    AdapterTuning,
    FreezeTuning,
    FullTuning,
    LoraTuning,
    QloraTuning,
    Tuning,
)

Model = TypeVar("Model", bound=nn.Module)


def apply_tuning(
    model: PreTrainedModel, tuning: Tuning, token_ids: Sequence[int] = ()
) -> PreTrainedModel | PeftModel:
    """Prepare `model`, in place, to be trained as `tuning` says.

    `token_ids`: those of `tuning.train_tokens`, see `ids_to_train`. A new adapter starts as a zero
    change; its random half comes from torch's global generator, so seed that before. Raises
    ModelError if the model lacks the layers or modules named, or peft cannot train them so.
    """
    match tuning:
        case FullTuning():
            model.requires_grad_(True)
            _train_score(model)
        case FreezeTuning():
            _train_top_layers(model, share=tuning.train_top, embeddings=tuning.embeddings)
            _train_score(model)
        case LoraTuning() | QloraTuning():
            check_base_is_saved(model.name_or_path)
            prevent_repacking(model)
            if tuning.adapter is not None:
                return _float32_where_trained(_continue_adapter(model, Path(tuning.adapter)))
            return _float32_where_trained(_add_lora(model, tuning, token_ids))
        case _:
            assert_never(tuning)
    return _float32_where_trained(model)


def check_quantized_base(source: str, tuning: Tuning) -> StoredQuantization | None:
    """How the weights that `tuning` trains on are stored, from config files alone; None: plainly.

    An adapter as the base is plain too: it is loaded merged into the dequantized base. Raises
    `ModelError` for a quantization that cannot be read or not be trained so and for a model of
    another purpose, and `MissingError` without bitsandbytes.
    """
    if (Path(source) / CONFIG_FILE).is_file():
        check_quantized_base(read_base(Path(source)), LoraTuning())
        return None
    check_purpose(source)
    stored = stored_quantization(source)
    if stored is None:
        return None
    if isinstance(tuning, FullTuning | FreezeTuning):
        raise ModelError(
            f"tuning.kind {tuning.kind} cannot train the base {source}: its weights are quantized "
            f"({stored})",
            remedy="use tuning.kind lora or qlora, or the unquantized model",
        )
    if isinstance(tuning, QloraTuning):
        for key in ("quant_type", "double_quant"):
            wanted, own = getattr(tuning, key), getattr(stored, key)
            if key in tuning.model_fields_set and wanted != own:
                raise ModelError(
                    f"tuning.{key} is {wanted}, but the base {source} is stored with {own}",
                    remedy=f"remove tuning.{key}, or use the unquantized model",
                )
    return stored


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters. Tied weights count once."""
    sizes = [(_count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def _count(parameter: Any) -> int:
    """Size of a weight, even if ZeRO-3 has sharded it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _float32_where_trained(model: Model) -> Model:
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Replace the data, not the parameter: tied weights must stay tied.
            parameter.data = parameter.data.float()
    return model


def _train_top_layers(model: PreTrainedModel, *, share: float, embeddings: bool) -> None:
    """Train the last `share` of the decoder layers, rounded up, and the norm after them.

    A tied head is trained with the embeddings or not at all.
    """
    decoder, layers = _find_layers(model)
    # 0.7 * 10 is 7.000000000000001; rounding up must not give 8.
    num_trained = math.ceil(round(share * len(layers), 9))
    trained: list[nn.Module | None] = [*layers[len(layers) - num_trained :]]
    trained += [
        module
        for name, module in decoder.named_children()
        if "norm" in type(module).__name__.lower() and "embed" not in name
    ]
    if embeddings:
        trained += [base_embeddings(model), base_head(model)]
    model.requires_grad_(False)
    for module in trained:
        if module is not None:
            module.requires_grad_(True)


def _train_score(model: PreTrainedModel) -> None:
    """Train the score of a reward model, whose own head nothing uses."""
    score, head = getattr(model, SCORE, None), base_head(model)
    if score is None:
        return
    score.requires_grad_(True)
    if head is not None and not is_tied(model):
        head.requires_grad_(False)


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The list of decoder layers and the module that holds it, whatever their names."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, child
    raise ModelError(
        f"{type(model).__name__} has no list of {num_layers} layers to freeze in part",
        remedy="use tuning.kind: lora or full",
    )


def ids_to_train(tuning: Tuning, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `tuning.train_tokens`. Raises ModelError for text that is not one token."""
    tokens = tuning.train_tokens if isinstance(tuning, AdapterTuning) else []
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ModelError(
                f'tuning.train_tokens: "{token}" is not a token of the tokenizer',
                remedy="name tokens as they stand in its vocabulary, such as <|im_end|>",
            )
    return sorted({vocabulary[token] for token in tokens})


def _add_lora(model: PreTrainedModel, tuning: AdapterTuning, token_ids: Sequence[int]) -> PeftModel:
    if not isinstance(tuning.targets, str):
        _check_targets(model, tuning.targets)
    _check_saved_modules(model, tuning.modules_to_save)
    has_score = hasattr(model, SCORE)
    saved = [*([SCORE] if has_score else ()), *tuning.modules_to_save]
    linear = {SCORE, *_linear_names(model)}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        use_dora=tuning.variant == "dora",
        use_rslora=tuning.variant == "rslora",
        trainable_token_indices=_rows_to_train(model, tuning, list(token_ids)) or None,
        modules_to_save=saved or None,
        exclude_modules=[name for name in saved if name.rpartition(".")[2] in linear] or None,
    )
    width = model.config.get_text_config().hidden_size
    if tuning.rank > width:
        raise ModelError(
            f"tuning.rank {tuning.rank:,} exceeds the model's hidden size of {width:,}",
            remedy="set a smaller rank, such as 16, or train whole weights with tuning.kind full",
        )
    others = _linear_names(model)
    try:
        with silence_libraries():
            tuned = get_peft_model(model, config)
    except ValueError as error:
        if "ParamWrapper" in str(error):
            raise _experts_refused(model, others) from error
        # For example dropout on the experts of a mixture, or layers that are not linear.
        raise ModelError(
            f"peft cannot apply this LoRA to the model: {str(error).strip().splitlines()[0]}",
            remedy="set tuning.dropout to 0, or name other modules in tuning.targets",
        ) from error
    if getattr(config, "target_parameters", None):
        raise _experts_refused(model, others)
    if tuning.variant == "dora":
        _check_lengths_of_rows(tuned)
    return tuned


def _check_saved_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Reject a name that no module has, or one whose weights cannot be trained as a whole."""
    named = dict(model.named_modules())
    leaf_names = sorted({name.rpartition(".")[2] for name, it in named.items() if _has_weight(it)})
    for name in names:
        found = [it for path, it in named.items() if path == name or path.endswith(f".{name}")]
        if not found:
            close = get_close_matches(name, leaf_names, n=1)
            raise ModelError(
                f'tuning.modules_to_save: no module of this model is called "{name}"; '
                f"it has {', '.join(leaf_names)}",
                remedy=f'did you mean "{close[0]}"?' if close else "use one of these",
            )
        weights = [weight for module in found for weight in module.parameters()]
        if any(not weight.is_floating_point() for weight in weights):
            raise ModelError(
                f"tuning.modules_to_save: {name} is quantized and cannot be trained as a whole",
                remedy="remove it, or use tuning.kind lora",
            )


def _has_weight(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of the linear layers, without the head."""
    head = model.get_output_embeddings()
    linear = (
        name for name, it in model.named_modules() if isinstance(it, nn.Linear) and it != head
    )
    return sorted({name.rpartition(".")[2] for name in linear})


def _experts_refused(model: PreTrainedModel, others: list[str]) -> ModelError:
    """The weights of experts are no layers of their own; `yrun merge` could not merge adapters."""
    return ModelError(
        f"tuning.targets all-linear includes the experts of this {model.config.model_type} model, "
        "and their adapter could not be merged",
        remedy=f"name the other layers, such as tuning.targets: [{', '.join(others)}]",
    )


def _rows_to_train(
    model: PreTrainedModel, tuning: AdapterTuning, token_ids: list[int]
) -> dict[str, list[int]]:
    """The rows to train in embeddings and head, by the name of the module; peft knows of ties."""
    if not token_ids:
        return {}
    layers = [base_embeddings(model)]
    if base_head(model) is not None and not is_tied(model):
        layers.append(base_head(model))
    names = [name for name, module in model.named_modules() if any(module is it for it in layers)]
    adapted = set() if isinstance(tuning.targets, str) else set(tuning.targets)
    for name in names:
        if {name, name.rpartition(".")[2]} & adapted:
            raise ModelError(
                f"tuning.targets and tuning.train_tokens cannot both train {name}",
                remedy="remove tuning.train_tokens: an adapter on the module trains every row",
            )
    return dict.fromkeys(names, token_ids)


def _check_lengths_of_rows(model: PeftModel) -> None:
    """Reject DoRA on a weight with a row of zeros: it divides by the length of each."""
    for name, module in model.named_modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            weight = magnitude.weight
            if weight.is_meta or weight.numel() == 0 or weight.count_nonzero() == weight.numel():
                continue
            row = int((weight.flatten() == 0).nonzero()[0])
            module_name = name.removeprefix("base_model.model.")
            raise ModelError(
                f"tuning.variant dora divides by the length of each row of {module_name}, and row "
                f"{row} is zero",
                remedy="use tuning.variant plain or rslora, or remove it from tuning.targets",
            )


def _continue_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"{folder} holds no adapter: it has no {CONFIG_FILE}",
            remedy="give the folder of a saved adapter",
        )
    return attach_adapter(model, folder, trainable=True)


def check_base_is_saved(base: str) -> None:
    """Raise `ModelError` for an adapter's folder as the base of a new adapter.

    The base's weights would exist in memory only, and the new adapter could not be loaded.
    """
    if base and (Path(base) / CONFIG_FILE).is_file():
        raise ModelError(
            f"the base {base} is itself an adapter (it has {CONFIG_FILE}); a new adapter needs a "
            "full model as its base",
            remedy=f"to continue training it, set tuning.adapter to this folder and model.base to "
            f"{read_base(Path(base))}; to start a new one, merge it first",
        )


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Reject a target that names no linear layer; peft accepts lists that match in part."""
    linear_names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    ]
    leaf_names = sorted({name.rpartition(".")[2] for name in linear_names})
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in linear_names):
            continue
        close = get_close_matches(target, leaf_names, n=1)
        raise ModelError(
            f'tuning.targets: no linear layer of this model is called "{target}"; '
            f"it has {', '.join(leaf_names)}",
            remedy=f'did you mean "{close[0]}"?' if close else "use these, or all-linear",
        )
    if not targets:
        raise ModelError("tuning.targets is empty", remedy="name a module, or use all-linear")
