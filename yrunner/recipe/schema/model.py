"""The recipe's `model` and `tuning`: the model, and which of its weights are trained."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from yrunner.recipe.schema.section import (
    BaseSource,
    ModelSource,
    Section,
    existing_file,
    is_recipe_path,
)

KNOWN_TEMPLATES = ("chatml", "llama3", "qwen3", "gemma", "mistral", "deepseek", "glm4", "phi4")
"""Chat templates that come with yrunner, in `models/templates/`."""


def _template(text: str, info: ValidationInfo) -> str:
    """A known name, or the absolute path of a file relative to the recipe's folder."""
    if text in KNOWN_TEMPLATES or info.context is None:
        return text
    if not text.endswith((".jinja", ".jinja2", ".txt", ".j2")) and "/" not in text:
        known = ", ".join(KNOWN_TEMPLATES)
        raise ValueError(f'"{text}" is neither a .jinja file nor one of {known}')
    return str(existing_file(Path(text), info))


TemplateSource = Annotated[str, Field(min_length=1), AfterValidator(_template)]

# Fixed by an existing adapter; a recipe that continues training one may not set them.
ADAPTER_SHAPE = (
    "rank",
    "alpha",
    "dropout",
    "targets",
    "variant",
    "train_tokens",
    "modules_to_save",
)


class ScratchModel(Section):
    """A model with random weights, and a tokenizer trained on the recipe's data."""

    config: dict[str, str | int | float | bool | None]
    """The architecture, as in a `config.json`: `model_type` and sizes, without `vocab_size`."""
    vocab_size: int = Field(8000, ge=300)
    """Size of the byte-level BPE vocabulary, including special tokens."""

    @model_validator(mode="after")
    def config_names_a_model_type(self) -> Self:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError('config needs a "model_type", for example qwen3, qwen2 or llama')
        if "vocab_size" in self.config:
            raise ValueError("vocab_size belongs next to config, not inside it; move it up")
        return self


class RopeScaling(Section):
    """Let the model read longer texts than those that it was trained on."""

    kind: Literal["yarn", "linear"]
    """`yarn`: stretches long waves only. `linear`: all positions."""
    factor: float = Field(gt=1, le=1000)
    """How many times longer texts than now."""


class ModelSection(Section):
    """The model to train."""

    base: BaseSource | None = None
    """A folder, a Hub id, a GGUF file (on the Hub: `organisation/name/file.gguf`), a model of
    ModelScope (`modelscope:organisation/name`), or another recipe, whose result is used, and
    trained first if missing."""
    scratch: ScratchModel | None = None
    """Create a new model instead of loading one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. `auto`: bfloat16 if the GPU supports it; on a CPU float32, and
    bfloat16 where a probe finds it faster: for training LoRA, and for the products of models that
    only answer or score. Trained weights are always float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto`: the default of transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for sources you trust."""
    chat_template: TemplateSource | None = None
    """A .jinja file that replaces the tokenizer's own chat template, or for a base without one the
    name of a known template: chatml, llama3, qwen3, gemma, mistral, deepseek, glm4 or phi4."""
    template_args: dict[str, Any] = Field({})
    """Arguments of the chat template, such as {enable_thinking: false} for Qwen3. Every command
    uses them, and the saved model has them as defaults. They must be names that the template
    reads."""

    rope: RopeScaling | None = None
    """Scale the rotary positions of the base, for longer texts; learn on such texts. The result
    keeps them."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Tokens to add to the base, such as marks of tools: ["<call>", "</call>"]. Each begins as the
    mean of all others, so it must be trained: name it in tuning.train_tokens too."""

    @property
    def template_file(self) -> Path | None:
        """The .jinja file of the recipe, if it names one."""
        template = self.chat_template
        return None if template is None or template in KNOWN_TEMPLATES else Path(template)

    @field_validator("template_args")
    @classmethod
    def arguments_are_names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f'"{name}" is not the name of an argument; correct it')
        return arguments

    @model_validator(mode="after")
    def exactly_one_origin(self) -> Self:
        if (self.base is None) == (self.scratch is None):
            raise ValueError('needs exactly one of "base" and "scratch"')
        if self.scratch is not None and self.chat_template is not None:
            raise ValueError(
                "chat_template needs a base: a new tokenizer has ChatML; remove chat_template"
            )
        if self.rope is None and not self.new_tokens:
            return self
        key = "rope" if self.rope is not None else "new_tokens"
        if self.base is None or is_recipe_path(self.base):
            raise ValueError(
                f"{key} needs a model as base; set it in the recipe of the base, or remove it"
            )
        if len(set(self.new_tokens)) < len(self.new_tokens):
            raise ValueError("new_tokens has a token twice; remove one")
        return self


class FullTuning(Section):
    """Train every weight."""

    kind: Literal["full"]


class FreezeTuning(Section):
    """Train only the last layers."""

    kind: Literal["freeze"]
    train_top: float = Field(0.5, gt=0, le=1)
    """Share of the layers to train, counted from the last and rounded up."""
    embeddings: bool = False
    """Also train the embeddings and the output head."""


class AdapterTuning(Section):
    """Keys shared by the kinds of tuning that train an adapter."""

    rank: int = Field(16, ge=1)
    """Rank of the added matrices. A higher rank learns more and needs more memory."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout of the adapter's inputs during training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: all linear layers except the head, or a list of names."""
    variant: Literal["plain", "dora", "rslora"] = "plain"
    """`dora`: arXiv:2402.09353. `rslora`: scale by alpha / sqrt(rank), arXiv:2312.03732."""
    train_tokens: list[str] = Field(default_factory=list)
    """Tokens whose rows in embeddings and output head are trained as well, such as marks of a chat
    template that the base has never learned: ["<|im_start|>", "<|im_end|>"]."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained as a whole beside the adapter and saved with it, such as
    [embed_tokens, lm_head]. They need the memory of full tuning."""
    lora_plus_ratio: float = Field(1.0, gt=0)
    """LoRA+ (arXiv:2402.12354): learning rate of the second matrices, B, relative to that of all
    other weights; 4 to 16 is usual. 1: the same."""
    adapter: ModelSource | None = None
    """Folder or Hub id of an adapter to continue training, with its own rank, alpha and targets."""

    @model_validator(mode="after")
    def embeddings_are_trained_by_rows_or_as_a_whole(self) -> Self:
        if self.train_tokens and self.modules_to_save:
            raise ValueError(
                "train_tokens and modules_to_save cannot be combined; remove train_tokens: modules "
                "that are trained as a whole train every row"
            )
        return self

    @model_validator(mode="after")
    def an_adapter_brings_its_own_shape(self) -> Self:
        shape = [key for key in ADAPTER_SHAPE if key in self.model_fields_set]
        if self.adapter is not None and shape:
            raise ValueError(f"the adapter already defines {', '.join(shape)}; remove it here")
        return self


class LoraTuning(AdapterTuning):
    """Train low-rank matrices next to the frozen weights (Hu et al., 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"


class QloraTuning(AdapterTuning):
    """LoRA on a base quantized to 4 or 8 bits (Dettmers et al., 2023, arXiv:2305.14314)."""

    kind: Literal["qlora"]
    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Data type of the stored weights: 16 values, spaced like normally distributed weights (nf4)
    or like floating point (fp4), or 256 values (int8, with outlier columns in half precision)."""
    double_quant: bool = True
    """Quantize the block scales to 8 bits too, which saves 0.4 bits per weight. Not for int8."""


Tuning = Annotated[
    FullTuning | FreezeTuning | LoraTuning | QloraTuning, Field(discriminator="kind")
]
