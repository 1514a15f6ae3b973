"""The recipe's `model` and `tuning`: which model is trained, and which part of it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.section import ModelOrRecipe, ModelSource, RecipeFile, Section

# What an adapter brings with it, and a recipe that goes on training one may not set.
ADAPTER_SHAPE = ("rank", "alpha", "dropout", "targets", "variant")


class ScratchModel(Section):
    """A model that starts from random weights, with a tokenizer trained on the recipe's data."""

    config: dict[str, str | int | float | bool | None]
    """The model's form, as in a `config.json`: `model_type` and sizes, without `vocab_size`."""
    vocab_size: int = Field(8000, ge=300)
    """Entries of the byte-level BPE tokenizer, special tokens included."""

    @model_validator(mode="after")
    def config_names_a_model_type(self) -> Self:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError('config needs a "model_type", for example qwen3, qwen2 or llama')
        if "vocab_size" in self.config:
            raise ValueError("vocab_size belongs beside config, not in it; move it up")
        return self


class ModelSection(Section):
    """Which model is trained."""

    base: ModelOrRecipe | None = None
    """A folder, a Hub id, or another recipe (its result; trained first when missing)."""
    scratch: ScratchModel | None = None
    """Build a new model instead of loading one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. auto: bfloat16 where the GPU has it, else float32.
    Weights that are trained are kept in float32 under each of them."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto leaves the choice to transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources whose programs you would run."""
    chat_template: RecipeFile | None = None
    """A .jinja file that replaces the tokenizer's own chat template."""

    @model_validator(mode="after")
    def exactly_one_origin(self) -> Self:
        if (self.base is None) == (self.scratch is None):
            raise ValueError('needs either "base" or "scratch", and not both')
        return self


class FullTuning(Section):
    """Train every weight."""

    kind: Literal["full"]


class FreezeTuning(Section):
    """Train the last layers only."""

    kind: Literal["freeze"]
    train_top: float = Field(0.5, gt=0, le=1)
    """Share of the layers, counted from the last, that are trained (rounded up)."""
    embeddings: bool = False
    """Train the embeddings and the output head too."""


class AdapterTuning(Section):
    """What tunings share that train an adapter: small matrices beside the frozen weights."""

    rank: int = Field(16, ge=1)
    """Size of the added matrices. Higher learns more and costs more memory."""
    alpha: float = Field(32, gt=0)
    """Strength of the adapter: its output is multiplied by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped while training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: all linear layers but the head, or a list of module names."""
    variant: Literal["plain", "dora", "rslora"] = "plain"
    """dora: arXiv:2402.09353. rslora: scale by alpha / sqrt(rank), arXiv:2312.03732."""
    adapter: ModelSource | None = None
    """Folder of an adapter to go on training; its own rank, alpha and targets are used then."""

    @model_validator(mode="after")
    def an_adapter_brings_its_own_shape(self) -> Self:
        shape = [key for key in ADAPTER_SHAPE if key in self.model_fields_set]
        if self.adapter is not None and shape:
            raise ValueError(f"an adapter brings its own {', '.join(shape)}; remove that here")
        return self


class LoraTuning(AdapterTuning):
    """Train small matrices beside the frozen weights (Hu et al., 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"


class QloraTuning(AdapterTuning):
    """LoRA on a base that is stored in 4 or 8 bits (Dettmers et al., 2023, arXiv:2305.14314)."""

    kind: Literal["qlora"]
    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """The values that a stored weight can have: sixteen, spread as weights are (nf4) or as
    floating point is (fp4), or 256 (int8, with columns of outliers in half precision)."""
    double_quant: bool = True
    """Store the scales of the blocks in 8 bits too: 0.4 bits less a weight. Not for int8."""


Tuning = Annotated[
    FullTuning | FreezeTuning | LoraTuning | QloraTuning, Field(discriminator="kind")
]
