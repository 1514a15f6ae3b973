"""Turn a GGUF file into a model folder in Hugging Face format, weight by weight."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig

from yrunner.console import counted, progress, say
from yrunner.errors import ModelError
from yrunner.models.errors import WEIGHTS_FILE, explain_failure, silence_libraries
from yrunner.models.gguf.architectures import (
    ARCHITECTURES,
    FULL_EVERY,
    GEMMA_27B,
    MODEL_TYPES,
    NO_ROPE_EVERY,
    Place,
    Places,
    llama3_factors,
    unpacked_experts,
    yarn_scale,
)
from yrunner.models.gguf.tokenizer import read_tokenizer
from yrunner.models.load import find_stop_ids
from yrunner.models.local import ORIGIN
from yrunner.models.merge.safetensors_io import write_weights
from yrunner.models.model_key import sample_of
from yrunner.storage.ownership import remove
from yrunner.storage.run_dir import whole_folder, write_json, write_text

MAGIC = b"GGUF"
VERSION = 1
"""Of what is made of a file; a new one unpacks it again."""
REMEDY = "use the model's folder in Hugging Face format"
LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_LENGTH = 8192
"""Length of the texts that Llama 3 saw first; GGUF files do not say it."""


@dataclass(frozen=True)
class GGUFFile:
    """The metadata of a GGUF file, and its weights, which are read when they are needed."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as `llama` or `qwen3`."""
        return str(self.fields.get("general.architecture"))

    def of(self, key: str, default: Any = None) -> Any:
        """A hyperparameter of this architecture."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    @property
    def types(self) -> dict[str, int]:
        """How many weights there are of every type, such as `Q4_1`."""
        return dict(Counter(tensor.tensor_type.name for tensor in self.tensors.values()))


def unpacked_folder(path: Path, bases: Path, dtype: torch.dtype) -> Path:
    """The model folder of a GGUF file, written to `bases` on first use.

    Raises `ModelError` for a file that cannot be a base, `RunError` for a full disk.
    """
    parts = [VERSION, path.stat().st_size, sample_of(path), str(dtype)]
    key = blake2b(repr(parts).encode(), digest_size=6).hexdigest()
    folder = bases / f"{path.stem}-{key}"
    if (folder / ORIGIN).is_file():
        return folder
    file = open_gguf(path)
    kinds = ", ".join(sorted(file.types, key=file.types.__getitem__, reverse=True))
    precision = str(dtype).removeprefix("torch.")
    config = read_gguf_config(file)
    needed = sum(shape.numel() for shape in _shapes(config).values()) * dtype.itemsize
    # Ranks and other commands may unpack the same file at the same time.
    own = bases / f"{folder.name}.{os.getpid()}"
    with (
        whole_folder(own, needed) as partial,
        progress(f"unpacking {path.name}, weights", len(file.tensors)) as advance,
    ):
        unpack(file, partial, dtype, advance)
    try:
        own.rename(folder)
    except OSError:
        remove(own)
    say(f"unpacked {path.name} ({file.architecture}, {kinds}) as {precision} to {folder}")
    return folder


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file. Raises `ModelError` for a damaged or another file."""
    with explain_failure(str(path)), path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        pointer = start == b"vers"
        raise ModelError(
            f"{path} is {'a Git LFS pointer' if pointer else 'not a GGUF file'}",
            remedy="run git lfs pull" if pointer else "download it again",
        )
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    # What numpy and the reader raise where bytes are missing or make no sense.
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ModelError(
            f"{path} is damaged or cut short ({error})", remedy="download it again"
        ) from error
    return GGUFFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def unpack(
    file: GGUFFile, folder: Path, dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """Write the model of a GGUF file, in this dtype, with its tokenizer and where it came from.

    Calls `advance(1)` for every weight. Raises `ModelError` for a model that transformers would
    compute differently.
    """
    tokenizer = read_tokenizer(file.fields, file.path.name)
    config = read_gguf_config(file)
    weights = _readers(file, config)
    config.dtype = dtype
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=find_stop_ids(tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(name: str) -> Tensor:
        advance(1)
        return weights[name]().to(dtype)

    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in
             _shapes(config).items()}  # fmt: skip
    write_weights(folder / WEIGHTS_FILE, sizes, make)
    license = file.fields.get("general.license")
    if license:
        write_text(folder / "README.md", f"---\nlicense: {license}\n---\n")
    write_json(folder / ORIGIN, describe(file, dtype))


def read_gguf(path: Path, config: Any) -> Any:
    """Load a GGUF file in float32, completely into memory, to prove it.

    The proof needs another reader than ours: that of transformers, which needs the original
    `config`, because it does not read Qwen3's head size or any scaling of rope. The scaling is what
    our reader finds in the file. A Mistral is a Llama in GGUF. Architectures that transformers does
    not read from GGUF are read by ours, with the config that the file has.
    """
    architecture = ARCHITECTURES[config.model_type]
    file = open_gguf(path)
    if not architecture.in_transformers:
        return _load(file)
    if config.model_type == "mistral":
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    if "rope_freqs.weight" not in file.tensors:  # the tensor of Llama 3 does not say its settings
        config = deepcopy(config)
        config.rope_parameters = read_gguf_config(file).rope_parameters
    # transformers shows a progress bar of its own.
    with silence_libraries(), redirect_stderr(StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, config=config, dtype=torch.float32
        )


def _load(file: GGUFFile) -> Any:
    config = read_gguf_config(file)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = model.state_dict()
    for name, read in _readers(file, config).items():
        weights[name].copy_(read())
    return model.eval()


def describe(file: GGUFFile, dtype: torch.dtype) -> dict[str, Any]:
    """Where a model came from: file, checksum, and the types of its weights."""
    with file.path.open("rb") as opened:
        checksum = file_digest(opened, "sha256").hexdigest()
    return {
        "file": file.path.name,
        "sha256": checksum,
        "name": file.fields.get("general.name"),
        "license": file.fields.get("general.license"),
        "architecture": file.architecture,
        "types": file.types,
        "dtype": str(dtype).removeprefix("torch."),
    }


def read_gguf_config(file: GGUFFile) -> Any:
    """The config of the model. Raises `ModelError` for an architecture that cannot be read."""
    _check_whole_model(file)
    kind = MODEL_TYPES[file.architecture]
    heads = file.of("attention.head_count")
    hidden = file.of("embedding_length")
    head_size = file.of("attention.key_length", hidden // heads)
    rotated = file.of("rope.dimension_count", head_size)
    is_whole = rotated == head_size or ARCHITECTURES[kind].rotates_a_part
    if not is_whole or file.of("attention.value_length", head_size) != head_size:
        raise ModelError(f"{file.path.name} has heads of unequal parts", remedy=REMEDY)
    options: dict[str, Any] = {
        "vocab_size": len(file.fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": file.of("feed_forward_length"),
        "num_hidden_layers": file.of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.of("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": file.of("context_length"),
        "rms_norm_eps": file.of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, head_size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # Defaults of some architectures are ids that a smaller vocabulary lacks.
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **(options | _options_of(file, kind, options)))
    _check_rope_factors(file, config)
    config.architectures = [type(_empty_model(config)).__name__]
    return config


def _options_of(file: GGUFFile, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What only some architectures have."""
    has_bias = "blk.0.attn_q.bias" in file.tensors
    match kind:
        case "llama":
            return {
                "attention_bias": has_bias,
                "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
            }
        case "glm4":
            return {"attention_bias": has_bias}
        case "smollm3":
            return {"no_rope_layer_interval": NO_ROPE_EVERY}
        case "qwen3_moe":
            return {
                "num_experts": file.of("expert_count"),
                "num_experts_per_tok": file.of("expert_used_count"),
                "moe_intermediate_size": file.of("expert_feed_forward_length"),
                "norm_topk_prob": True,
            }
        case "phi3":
            original = file.of("rope.scaling.original_context_length", file.of("context_length"))
            return {
                "sliding_window": file.of("attention.sliding_window") or None,
                "original_max_position_embeddings": original,
            }
        case "gemma2" | "gemma3_text":
            return _options_of_gemma(file, kind, options)
        case _:
            return {}


def _options_of_gemma(file: GGUFFile, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    layers, every = options["num_hidden_layers"], FULL_EVERY[kind]
    scale = options["head_dim"]
    if layers == GEMMA_27B[kind]:
        scale = options["hidden_size"] // options["num_attention_heads"]
    window = file.of("attention.sliding_window", 4096 if kind == "gemma2" else None)
    pattern = file.of("attention.sliding_window_pattern", every)
    if window is None or pattern != every:
        raise ModelError(f"{file.path.name} has another window than a {kind}", remedy=REMEDY)
    rope = options["rope_parameters"]
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": file.of("rope.freq_base_swa", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    cap = 50.0 if kind == "gemma2" else None
    return {
        "query_pre_attn_scalar": scale,
        "sliding_window": window,
        "rope_parameters": rope,
        "attn_logit_softcapping": file.of("attn_logit_softcapping", cap),
        "final_logit_softcapping": file.of(
            "final_logit_softcapping", 30.0 if kind == "gemma2" else None
        ),
    }


def _check_whole_model(file: GGUFFile) -> None:
    """Raise `ModelError` for what is not one whole model of a known architecture."""
    name, kind = file.path.name, file.fields.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{name} holds a GGUF {kind}, not a model", remedy="name a model's file")
    if file.fields.get("split.count", 1) > 1:
        raise ModelError(
            f"{name} is one of {file.fields['split.count']} parts",
            remedy="join them first: llama-gguf-split --merge",
        )
    has_experts = file.of("expert_count", 0) and file.architecture != "qwen3moe"
    if file.architecture not in MODEL_TYPES or has_experts:
        kind = f"{file.architecture} with experts" if has_experts else file.architecture
        raise ModelError(
            f"{name} holds a {kind} model; GGUF bases can be {', '.join(sorted(MODEL_TYPES))}",
            remedy=REMEDY,
        )


def _rope(file: GGUFFile, head_size: int) -> dict[str, Any]:
    """Rotary position embeddings, as in a config.json."""
    rope: dict[str, Any] = {"rope_theta": file.of("rope.freq_base", 10000.0)}
    rotated = file.of("rope.dimension_count", head_size)
    if ARCHITECTURES[MODEL_TYPES[file.architecture]].rotates_a_part:
        rope["partial_rotary_factor"] = rotated / head_size
    kind = file.of("rope.scaling.type", "none")
    # Older files have a factor only.
    factor = file.of("rope.scaling.factor", file.of("rope.scale_linear", 1.0))
    if "rope_freqs.weight" in file.tensors:
        return rope | {
            "rope_type": "llama3",
            "factor": float(_number(file, "rope_freqs.weight").max()),
            "original_max_position_embeddings": LLAMA_3_LENGTH,
            **LLAMA_3_ROPE,
        }
    if "rope_factors_long.weight" in file.tensors:
        return rope | {
            "rope_type": "longrope",
            "original_max_position_embeddings": file.of("rope.scaling.original_context_length"),
            "attention_factor": file.of("rope.scaling.attn_factor", 1.0),
            **{
                f"{length}_factor": _number(file, f"rope_factors_{length}.weight").tolist()
                for length in ("long", "short")
            },
        }
    if kind == "yarn":
        return rope | _yarn(file, factor)
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path.name} has rope scaling of the type {kind}", remedy=REMEDY)
    if file.of("rope.scaling.attn_factor", 1.0) != 1:
        raise ModelError(
            f"{file.path.name} has rope.scaling.attn_factor without YaRN", remedy=REMEDY
        )
    if kind == "linear" and factor != 1:
        return rope | {"rope_type": "linear", "factor": factor}
    return rope | {"rope_type": "default"}


def _yarn(file: GGUFFile, factor: float) -> dict[str, Any]:
    """The settings of YaRN.

    llama.cpp's converter copies keys named yarn_* from a config.json. llama.cpp itself reads them
    from the files of other architectures only.
    """
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        found = file.of(f"rope.scaling.{key}", usual)
        if found != usual:
            raise ModelError(f"{file.path.name} has rope.scaling.{key} {found}", remedy=REMEDY)
    original = file.of("rope.scaling.original_context_length", file.of("context_length"))
    scale = file.of("rope.scaling.yarn_attn_factor")
    if scale is None:
        scale = yarn_scale(factor) * file.of("rope.scaling.attn_factor", 1.0)
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": scale,
    }
    for key in ("beta_fast", "beta_slow"):
        if (found := file.of(f"rope.scaling.yarn_{key}")) is not None:
            rope[key] = found
    return rope


def _check_rope_factors(file: GGUFFile, config: Any) -> None:
    """Raise `ModelError` if the file's rope factors are not those of transformers' formula."""
    if "rope_freqs.weight" not in file.tensors:
        return
    found = _number(file, "rope_freqs.weight")
    if not torch.allclose(found, llama3_factors(config), rtol=1e-4):
        raise ModelError(
            f"{file.path.name} has rope factors that are not those of Llama 3", remedy=REMEDY
        )


def _empty_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any) -> dict[str, torch.Size]:
    """The shape of every weight, by its name in transformers; experts are apart."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = _empty_model(config).state_dict()
    return unpacked_experts({name: size for name, size in weights.items() if name not in tied})


def _readers(file: GGUFFile, config: Any) -> dict[str, Callable[[], Tensor]]:
    """A function that reads a weight in float32, for every weight of the model.

    Raises `ModelError` if the file lacks weights, or has others.
    """
    places = Places(config)
    readers: dict[str, Callable[[], Tensor]] = {}
    used = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    for name, shape in _shapes(config).items():
        place = places.find(name)
        found = None if place is None else _shape_at(file, place)
        if place is None or found != tuple(shape):
            lacking = name if place is None else place.target
            raise ModelError(f"{file.path.name} lacks the weight {lacking}", remedy=REMEDY)
        used.add(place.target)
        readers[name] = partial(_read, file, places, name, place)
    others = sorted(file.tensors.keys() - used)
    if others:
        raise ModelError(
            f"{file.path.name} has {counted(len(others), 'weight')} that a {file.architecture} "
            f"model has not, such as {others[0]}",
            remedy=REMEDY,
        )
    return readers


def _shape_at(file: GGUFFile, place: Place) -> tuple[int, ...] | None:
    """The shape of a weight in the file, or of its expert; None if it is missing."""
    tensor = file.tensors.get(place.target)
    if tensor is None:
        return None
    shape = tuple(reversed(tensor.shape.tolist()))
    return shape if place.expert is None else shape[1:]


def _read(file: GGUFFile, places: Places, name: str, place: Place) -> Tensor:
    return places.from_gguf(name, _number(file, place.target, place.expert))


def _number(file: GGUFFile, source: str, expert: int | None = None) -> Tensor:
    """One weight in float32, or that of one expert."""
    tensor = file.tensors[source]
    data = tensor.data if expert is None else tensor.data[expert]
    # A copy: weights that are not quantized are views of the file.
    return torch.from_numpy(np.array(gguf.dequantize(data, tensor.tensor_type)))
