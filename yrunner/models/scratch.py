"""Create a model from scratch: train a byte-level BPE tokenizer, initialise random weights."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from yrunner.errors import ModelError
from yrunner.models.errors import silence_libraries
from yrunner.models.limits import is_causal
from yrunner.models.load import without_zero3
from yrunner.models.templates.choose import known_template

PAD_TOKEN = "<|endoftext|>"
TURN_START_TOKEN = "<|im_start|>"
TURN_END_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = [PAD_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN]
NUM_BYTES = 256

# Qwen2's pattern (its tokenizer.json): words include the space before them; every digit is a word,
# and so is a run of Chinese characters.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Raised by transformers 5.23 for models of contradictory sizes; it has no specific exception for
# that. The code under these `except` clauses is small enough for such a wide net.
BUILD_ERRORS = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with the ChatML chat template.

    All 256 bytes are tokens, so there is no unknown token and decoding restores the text exactly
    (Wang et al., 2019, arXiv:1909.03341). Deterministic. `vocab_size` includes the special tokens;
    texts with few repeated pairs may not reach it.

    Raises ModelError if `vocab_size` has no room for the bytes and the special tokens.
    """
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ModelError(
            f"a byte-level vocabulary of {vocab_size} is too small",
            remedy=f"set model.scratch.vocab_size to {smallest} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets include the space of a word, so that spans of characters map to whole tokens.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A pair that occurs once is not a pattern.
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=TURN_END_TOKEN,
        additional_special_tokens=[TURN_START_TOKEN],
        clean_up_tokenization_spaces=False,
        chat_template=known_template("chatml"),
    )


def build_model(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Build a causal language model with random float32 weights, in evaluation mode, on the CPU.

    `config` has the keys of a `config.json`: `model_type` and sizes. Vocabulary size and special
    ids come from the tokenizer. `seed` determines the weights; the caller's random state is
    restored.

    Raises ModelError for an unknown model type or key, and for contradictory sizes.
    """
    full_config = make_config(config, tokenizer)
    model_type, sizes = _split(config)
    with silence_libraries(), _seeded(seed), torch.device("cpu"), without_zero3():
        try:
            model = AutoModelForCausalLM.from_config(full_config, dtype=torch.float32).eval()
        except BUILD_ERRORS as error:
            raise _contradiction(model_type, sizes, str(error)) from error
        _check_sizes(model, model_type, sizes)
        _check_it_runs(model, model_type, sizes)
    return model


def make_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The full config of the model. Raises ModelError as `build_model` does."""
    model_type, sizes = _split(config)
    config_class = _config_class(model_type)
    _check_keys(sizes, config_class)
    with silence_libraries():
        try:
            return config_class(**sizes, **_tokenizer_keys(tokenizer))
        except BUILD_ERRORS as error:
            raise _contradiction(model_type, sizes, str(error)) from error


def _split(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model type, and the other keys."""
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    return config.get("model_type"), sizes


def _config_class(model_type: object) -> type[PreTrainedConfig]:
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        raise ModelError(
            f'no causal language model has the model_type "{model_type}"',
            remedy=_suggestion(str(model_type), known) or "use qwen3, qwen2 or llama, for example",
        )
    return type(AutoConfig.for_model(model_type))


def _tokenizer_keys(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _check_keys(sizes: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Reject keys that transformers would store and never read."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # read by the config, but not among its fields
    ours = {"vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "dtype"}
    for key in sizes:
        if key in ours:
            raise ModelError(
                f"model.scratch.config.{key} is set from the tokenizer or the recipe",
                remedy="remove it",
            )
        if key not in known and not _is_read(key, config_class):
            raise ModelError(
                f"model.scratch.config.{key}: {config_class.model_type} models have no such key",
                remedy=_suggestion(key, sorted(known - ours)) or "remove it",
            )


def _is_read(key: str, config_class: type[PreTrainedConfig]) -> bool:
    """Whether the model's source reads a key that its config does not declare.

    Qwen3-MoE's head_dim is one: `getattr(config, "head_dim", ...)`.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    reads = re.compile(rf"""config\.{re.escape(key)}\b|["']{re.escape(key)}["']""")
    modules = {config_class.__module__, model_class.__module__}
    return any(reads.search(inspect.getsource(sys.modules[name])) for name in modules)


def _check_sizes(model: PreTrainedModel, model_type: str, sizes: dict[str, Any]) -> None:
    """Reject what transformers builds silently: layers of size 0, heads that do not fit."""
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise _contradiction(model_type, sizes, "a size is 0")
    hidden_size = getattr(model.config, "hidden_size", 0)
    num_heads = getattr(model.config, "num_attention_heads", None) or 1
    if getattr(model.config, "head_dim", None) is None and hidden_size % num_heads:
        raise _contradiction(
            model_type, sizes, f"hidden_size {hidden_size} does not divide by {num_heads} heads"
        )


def _check_it_runs(model: PreTrainedModel, model_type: str, sizes: dict[str, Any]) -> None:
    """Run the model on a few tokens: some contradictions show only there.

    It must also be causal: BERT, for one, can be built as a causal model but sees future tokens
    unless `is_decoder` is set.
    """
    try:
        sees_what_comes = not is_causal(model)
    except BUILD_ERRORS as error:
        raise _contradiction(model_type, sizes, str(error)) from error
    if sees_what_comes:
        raise ModelError(
            f"this {model_type} model sees the tokens that it should predict",
            remedy="set is_decoder: true in model.scratch.config, or choose another model_type",
        )


def _contradiction(model_type: str, sizes: dict[str, Any], reason: str) -> ModelError:
    reason = (reason.strip().splitlines() or ["unknown reason"])[-1].strip().rstrip(".")
    as_text = [key for key, value in sizes.items() if isinstance(value, str) and _is_number(value)]
    remedy = "check the sizes: hidden_size, num_attention_heads, num_key_value_heads, head_dim"
    if as_text:
        remedy = f"write {as_text[0]} with a dot, as in 1.0e-6: YAML reads 1e-6 as text"
    return ModelError(
        f"no {model_type} model can be built from model.scratch.config ({reason})", remedy=remedy
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _suggestion(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f'did you mean "{close[0]}"?' if close else ""


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator temporarily; `torch.manual_seed` would change the GPUs' too."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
