"""Load a model or a tokenizer from a folder or the Hub: completely, or not at all.

transformers fills gaps with random weights, an empty vocabulary or a log line, easily overlooked in
a run of hours. Here every gap is a ModelError.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_utils,
)
from transformers.integrations import deepspeed
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from yrunner.console import counted
from yrunner.errors import ModelError
from yrunner.losses.vocabulary_layers import count_embeddings, is_tied
from yrunner.models.adapters import (
    attach_adapter,
    find_adapter,
    merge_adapter,
    read_base,
    untie_config,
)
from yrunner.models.errors import (
    check_weight_files,
    explain_failure,
    loaded_files,
    silence_libraries,
)
from yrunner.models.hub import only_cached
from yrunner.models.limits import can_be_tried, check_causal, check_purpose
from yrunner.models.local import DTYPE_NAMES, local_folder, stored_dtypes
from yrunner.models.quantization import dequantize, prepare_quantized, stored_quantization
from yrunner.models.templates.choose import choose_template
from yrunner.text_files import read_text
from yrunner.tokens import TEMPLATE_ERRORS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PROBED_ROWS, PROBE_REPEATS = 256, 5
NARROWEST = 256
"""In narrower models little time goes into products."""
WORTH_IT = 0.75
"""bfloat16 has to take at most this part of float32's time."""
MOST_NAMED = 3
"""Tokens that are named where two tokenizers differ."""
# Tokens that models reserve for padding, by preference.
PAD_TOKENS = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")


def choose_dtype(name: str) -> torch.dtype:
    """The dtype for `model.dtype`. auto: bfloat16 if the GPU supports it natively, else float32."""
    if name == "auto":
        # Emulated bfloat16 (before Ampere) would be slower than float32.
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float32
    return DTYPES[name]


@cache
def time_in_bfloat16(width: int, inner: int) -> float | None:
    """Time of products with a frozen weight on this CPU in bfloat16, beside float32.

    Of the weight [inner, width] and rows in float32, so with their conversion. None if the CPU has
    no instructions for bfloat16.
    """
    if not any(has_it for name, has_it in torch.cpu.get_capabilities().items() if "bf16" in name):
        return None
    weights = {it: torch.ones(inner, width, dtype=it) for it in (torch.float32, torch.bfloat16)}
    rows = torch.ones(PROBED_ROWS, width)
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(PROBE_REPEATS):
        # In turns, the fastest of several, and time on the CPU: other programs may use it too.
        for dtype, weight in weights.items():
            began = time.thread_time()
            _ = (rows.to(dtype) @ weight.T).float()
            best[dtype] = min(best[dtype], time.thread_time() - began)
    return best[torch.bfloat16] / best[torch.float32]


def load_model(
    source: str,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, every weight from a safetensors file.

    An adapter is loaded as its base with the adapter merged, in memory. `quantization`: a config of
    transformers for the linear layers; it needs a full model as source. Raises ModelError for
    anything wrong with the source, MissingError for a missing package.
    """
    _check_source(source)
    with silence_libraries(keep_progress=True), explain_failure(source):
        adapter = find_adapter(source)
    if adapter is not None and quantization is not None:
        raise ModelError(
            f"the base {source} is an adapter, which cannot be quantized with its own base",
            remedy="merge it first with yrun merge, or continue training it with tuning.adapter",
        )
    if adapter is not None:
        with without_zero3():
            model = load_model(
                read_base(adapter),
                dtype=dtype,
                attention=attention,
                trust_remote_code=trust_remote_code,
            )
            model = dequantize(model, dtype)  # merging into 4 bits would round the adapter away
            model = merge_adapter(attach_adapter(model, adapter, trainable=False))
        if (adapter / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(adapter)
        # The adapter's local folder, even for a Hub id: tuning.py reads its config there.
        model.config.name_or_path = model.name_or_path = str(adapter)
        return model
    check_folder(Path(source))
    if not Path(source).is_dir():
        with silence_libraries(), explain_failure(source):
            cached_file(source, "config.json", local_files_only=only_cached(source))
    check_purpose(source)
    if stored_quantization(source) is not None:
        quantization = None  # that of its files holds
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    if quantization is not None:
        options["quantization_config"] = quantization
    # Show progress of downloads only.
    with (
        silence_libraries(keep_progress=not Path(source).is_dir()),
        explain_failure(source),
        _reading_in_turn() if _is_converted(source, dtype) else nullcontext(),
    ):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=only_cached(source),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_complete` refuses them, with their names
            **options,
        )
    _check_complete(source, report)
    prepare_quantized(model, dtype)
    if not is_tied(model):
        untie_config(model.config)  # files with two weights beat a config that ties them
    if can_be_tried(model):
        check_causal(model)
    return model


def _is_converted(source: str, dtype: torch.dtype) -> bool:
    """Whether weights on this machine are stored in another dtype."""
    folder = local_folder(source)
    return folder is not None and stored_dtypes(loaded_files(folder)) != {DTYPE_NAMES[dtype]}


@contextmanager
def _reading_in_turn() -> Iterator[None]:
    """Let transformers read one weight after the other from a file.

    It maps files, so all of their pages are in memory before the last weight is converted. It has
    this way too, but keeps it for Windows and for Apple's GPUs (transformers 5.23).
    """
    mapping: Any = modeling_utils.safe_open

    def read(*args: Any, **options: Any) -> Any:
        return mapping(*args, **(options | {"backend": "pread"}))

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping


def check_folder(folder: Path) -> None:
    """Raise `ModelError` if a model's folder lacks its config or its weights, or parts of them."""
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no model: it has no config.json",
            remedy="give the folder that save_pretrained or yrun train wrote",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            check_weight_files(folder)
            raise ModelError(
                f"{pickled[0]} is a pickle, which can run arbitrary code when read",
                remedy="if you trust it, convert it: load it, then save_pretrained(...)",
            )
        raise ModelError(f"{folder} has no model.safetensors", remedy="download the model again")
    check_weight_files(folder)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Build full weights on every process; DeepSpeed shards them when training begins.

    For models built from scratch and adapters to merge. A plain base is sharded while it is loaded,
    because it may not fit into one process.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def load_tokenizer(
    source: str,
    *,
    chat_template: str | Path | None = None,
    template_args: Mapping[str, Any] | None = None,
    strict: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, an adapter folder or a Hub id, with a pad token.

    The chat template and its arguments are those of `choose_template`. For an adapter folder
    without a tokenizer, load that of its base.
    """
    _check_source(source)
    folder = Path(source)
    has_own = not folder.is_dir() or any(folder.glob("*token*")) or any(folder.glob("vocab*"))
    adapter = None if has_own else find_adapter(source)
    if adapter is not None:
        source = read_base(adapter)
    own_template = Path(source, "chat_template.jinja")
    text = read_text(own_template) if own_template.is_file() else None
    with silence_libraries(), explain_failure(source):
        tokenizer = _tokenizer_class(source).from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            local_files_only=only_cached(source),
        )
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        # Without tokenizer files transformers makes an empty tokenizer of the model's kind.
        raise ModelError(f"{source} holds no tokenizer", remedy="add its tokenizer.json")
    if isinstance(tokenizer.chat_template, str) and text is not None:
        tokenizer.chat_template = text  # transformers keeps a byte order mark
    choose_template(tokenizer, chat_template, template_args, strict=strict)
    _ensure_pad_token(tokenizer, source)
    return tokenizer


def find_stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's eos and the end-of-turn token of the template.

    They differ in many base models: Qwen3-Base ends a text with <|endoftext|>, a turn with
    <|im_end|>. With eos alone, a model tuned on its template would never stop.
    """
    stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return stop_ids
    question = {"role": "user", "content": "a"}
    turns = [question, {"role": "assistant", "content": "the reply"}]
    marks = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    # GLM ends a reply with the mark of the next turn only.
    for talk in (turns, [*turns, question]):
        try:
            text = str(tokenizer.apply_chat_template(talk, tokenize=False))
        except TEMPLATE_ERRORS:
            return stop_ids  # a template for other roles: eos only
        after = tokenizer(text.rpartition("the reply")[2], add_special_tokens=False).input_ids
        if after and after[0] in marks and after[0] not in stop_ids:
            stop_ids.append(after[0])
        if after:
            break
    return stop_ids


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` if the tokenizer has ids without an embedding; see `check_ids`."""
    check_ids(tokenizer, count_embeddings(model))


def check_ids(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raise `ModelError` if the tokenizer has ids beyond `num_embeddings`.

    More embeddings than ids are fine: Qwen and others round their number up.
    """
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= num_embeddings:
        raise ModelError(
            f"the tokenizer has ids up to {largest_id}, the model only {num_embeddings} embeddings",
            remedy="use the tokenizer that belongs to the model",
        )


def check_same_tokens(student: Any, teacher: Any, name: str) -> None:
    """Raise `ModelError` if the tokenizers of a model and its teacher have different ids."""
    difference = difference_of(student.get_vocab(), teacher.get_vocab())
    if difference is not None:
        raise ModelError(
            f"the teacher {name} has another tokenizer than the model: {difference}",
            remedy="use a teacher of the same family",
        )


def difference_of(student: dict[str, int], teacher: dict[str, int]) -> str | None:
    """The first ids that stand for different tokens, in words; None if there are none."""
    ours, theirs = ({id_: token for token, id_ in each.items()} for each in (student, teacher))
    different = [
        id_ for id_ in sorted(ours.keys() | theirs.keys()) if ours.get(id_) != theirs.get(id_)
    ]
    if not different:
        return None
    named = ", ".join(
        f"id {id_} is {_named(ours.get(id_))} in the model's and {_named(theirs.get(id_))} in "
        "the teacher's"
        for id_ in different[:MOST_NAMED]
    )
    more = len(different) - MOST_NAMED
    return f"{named}, and {counted(more, 'more id')} differ" if more > 0 else named


def _named(token: str | None) -> str:
    return "no token" if token is None else json.dumps(token, ensure_ascii=False)


def _check_source(source: str) -> None:
    path = Path(source)
    if path.is_file():
        raise ModelError(f"{source} is a file", remedy="give the folder that holds config.json")
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~"))):
        raise ModelError(f"there is no folder {source}", remedy="check model.base")


def _check_complete(source: str, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {counted(len(missing), 'weight')}, such as {missing[0]}, which would "
            "be random",
            remedy="download the model again, or check the sizes in its config.json",
        )
    wrong = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if wrong or report["error_msgs"]:
        raise ModelError(
            f"{source} has weights whose shapes differ from its config.json, such as "
            f"{(wrong or report['error_msgs'])[0]}",
            remedy="download the model again",
        )


def _tokenizer_class(source: str) -> Any:
    """Load tokenizer.json unchanged if the tokenizer was saved without a specific class.

    AutoTokenizer uses Qwen2Tokenizer next to a qwen2 config.json, which changes the text (NFC), but
    not next to an adapter: base and adapter would get different ids.
    """
    saved_class = get_tokenizer_config(source, local_files_only=only_cached(source)).get(
        "tokenizer_class"
    )
    return PreTrainedTokenizerFast if saved_class == "TokenizersBackend" else AutoTokenizer


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Set a pad token if the tokenizer has none, preferably one that no text uses.

    eos is the last resort. Where labels are masked by the pad id, that would mask the stop token;
    here they are never masked by id.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = [t for t in PAD_TOKENS if t in vocabulary and t != tokenizer.eos_token]
    if not reserved and tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source} has neither a pad nor an eos token",
            remedy="set eos_token in its tokenizer_config.json",
        )
    tokenizer.pad_token = reserved[0] if reserved else tokenizer.eos_token
