"""A base that reads longer texts, or has more tokens, as a model folder of its own.

Whatever comes after treats that folder as any other base: training, proofs, exports.
"""

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM

from yrunner.console import counted, say
from yrunner.errors import ModelError
from yrunner.models.adapters import find_adapter
from yrunner.models.errors import WEIGHTS_FILE
from yrunner.models.load import load_tokenizer
from yrunner.models.local import ORIGIN
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint, write_weights
from yrunner.models.meta import read_config
from yrunner.models.model_key import model_key
from yrunner.models.quantization import stored_quantization
from yrunner.recipe.schema.model import RopeScaling
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import whole_folder

VERSION = 1
"""Of what is made; a new one makes it again."""
CONFIG = "config.json"
KEPT = ("generation_config.json", "README.md", "LICENSE", ORIGIN)
"""Files that say nothing about tokens."""


def extended_folder(
    source: str, bases: Path, rope: RopeScaling | None, new_tokens: Sequence[str]
) -> Path:
    """The folder of a base with a longer rope or more tokens, made in `bases` on first use.

    Weights that stay as they are are links. Raises `ModelError` for a base that cannot be extended.
    """
    if find_adapter(source) is not None:
        raise ModelError(
            f"model.rope and model.new_tokens need a whole model, but {source} is an adapter",
            remedy="merge it first: yrun merge",
        )
    parts = [VERSION, model_key(source), rope.model_dump() if rope else None, list(new_tokens)]
    key = blake2b(repr(parts).encode(), digest_size=6).hexdigest()
    folder = bases / f"{Path(source).name}-{key}"
    if (folder / CONFIG).is_file():
        if all(path.exists() for path in folder.iterdir()):
            return folder
        remove(folder)  # the files that it links to have gone
    checkpoint = open_checkpoint(source)
    if stored_quantization(str(checkpoint.folder)) is not None:
        raise ModelError(
            f"{source} is stored quantized and cannot be extended", remedy="name the exact model"
        )
    config = read_config(str(checkpoint.folder))
    done = [] if rope is None else [scale_rope(config, rope)]
    # Ranks and other commands may do the same at the same time.
    own = bases / f"{folder.name}.{os.getpid()}"
    copied = checkpoint.sizes.values() if new_tokens else ()
    needed = sum(weight.numel() * weight.element_size() for weight in copied)
    with whole_folder(own, needed) as partial:
        if new_tokens:
            _write_with_tokens(checkpoint, config, new_tokens, partial)
            done.append(f"{counted(len(new_tokens), 'new token')}, each the mean of all others")
        config.save_pretrained(partial)
        for file in checkpoint.folder.iterdir():
            is_kept = file.name in KEPT or not new_tokens
            if file.is_file() and is_kept and not (partial / file.name).exists():
                (partial / file.name).symlink_to(file.resolve())
    try:
        own.rename(folder)
    except OSError:
        remove(own)
    say(f"{Path(source).name} with {' and '.join(done)}: {folder}")
    return folder


def scale_rope(config: Any, rope: RopeScaling) -> str:
    """Change a config so that the model reads longer texts, and say how.

    Raises `ModelError` for a model without rope, or one whose rope is scaled already.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ModelError(
            f"model.rope: a {config.model_type} model has no rope to scale",
            remedy="remove model.rope",
        )
    whole = parameters.get("full_attention", parameters)
    kind = whole.get("rope_type", "default")
    if kind != "default":
        raise ModelError(
            f"model.rope: the rope of this model is scaled already ({kind})",
            remedy="remove model.rope, or use a base of the same family without it",
        )
    longest = config.max_position_embeddings
    scaled = {**whole, "rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaled["original_max_position_embeddings"] = longest
    nested = "full_attention" in parameters
    config.rope_parameters = {**parameters, "full_attention": scaled} if nested else scaled
    config.max_position_embeddings = int(longest * rope.factor)
    return f"rope scaled by {rope.kind} from {longest:,} to {int(longest * rope.factor):,} tokens"


def _write_with_tokens(
    checkpoint: SafetensorsFolder, config: Any, new_tokens: Sequence[str], folder: Path
) -> None:
    """Write tokenizer and weights with rows for new tokens, and change the config."""
    tokenizer = load_tokenizer(str(checkpoint.folder), strict=False)
    known = tokenizer.get_vocab()
    for token in new_tokens:
        if token in known:
            raise ModelError(
                f'model.new_tokens: "{token}" is a token of this model already',
                remedy="remove it; tuning.train_tokens trains the rows of existing tokens",
            )
    rows = len(tokenizer)
    # Not special: answers are decoded without special tokens, and these are to be seen.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    tokenizer.save_pretrained(folder)
    grown = set(_rows_of_tokens(config, checkpoint))
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    sizes = checkpoint.sizes
    for name in grown:
        shape = (config.vocab_size, *sizes[name].shape[1:])
        sizes[name] = torch.empty(shape, dtype=sizes[name].dtype, device="meta")

    def make(name: str) -> Tensor:
        weight = checkpoint.read(name)
        if name not in grown:
            return weight
        mean = weight[:rows].float().mean(0, keepdim=True).to(weight.dtype)
        added = mean.expand(len(tokenizer) - rows, *mean.shape[1:])
        # A base may have spare rows behind its last token.
        return torch.cat([weight[:rows], added, weight[len(tokenizer) :]])

    write_weights(folder / WEIGHTS_FILE, sizes, make)


def _rows_of_tokens(config: Any, checkpoint: SafetensorsFolder) -> Iterator[str]:
    """Names of the weights with a row for every token: embeddings, head and its biases."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
    found = [
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if id(weight) in rows and name in checkpoint.locations
    ]
    if not found:
        raise ModelError(
            f"model.new_tokens: the embeddings of a {config.model_type} model are not found",
            remedy="remove model.new_tokens",
        )
    yield from found
