"""The recipe: every key, its meaning, its limits and its default.

`schema_model.py` and `schema_data.py` hold the sections that say what is trained and on what,
`schema_keep.py` how it is held to what its base knew, `schema_distributed.py` how it is spread over
processes, `schema_sort.py` how its rows are judged,
`schema_eval.py` how the result is measured, `schema_compare.py` how versions of it are set against
each other and `schema_merge.py` what becomes of it; this file holds how it is learned, and the
whole.

The recipe's `train.spikes`: what counts as a sudden jump of the loss, and what follows.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.compare import CompareSection
from yrunner.recipe.schema.data import DataSection
from yrunner.recipe.schema.distributed import DistributedSection
from yrunner.recipe.schema.eval import EvalSection
from yrunner.recipe.schema.keep import DriftSection, HeldToRows, Keep, NoKeep
from yrunner.recipe.schema.merge import MergeSection
from yrunner.recipe.schema.model import LoraTuning, ModelSection, QloraTuning, Tuning
from yrunner.recipe.schema.section import Section
from yrunner.recipe.schema.sort import SortSection


class Spikes(Section):
    """A loss far above those of the updates before it."""

    window: int = Field(100, ge=10)
    """Updates that a loss is compared with. The first of a run, a tenth of a window, are not."""
    deviations: float = Field(10.0, gt=0)
    """Distance from their median, in standard deviations that outliers do not move (1.48 times the
    median distance, and a twentieth of the median at the least)."""
    action: Literal["warn", "stop", "ignore"] = "warn"
    """stop: before the optimizer moves, as at a loss that is not a number."""


class WeightedLoss(Section):
    """What the losses of all kinds share."""

    normalize: Literal["targets", "weights"] = "targets"
    """What the weighted losses of an update are divided by: the number of its targets, or the sum
    of their weights, which makes updates of small weights as long as others."""


class PlainLoss(WeightedLoss):
    """Cross-entropy: every target counts alike."""

    kind: Literal["plain"] = "plain"


class NlirgLoss(WeightedLoss):
    """Cross-entropy weighed per token by how hard it is right now; see docs/guide/nlirg.md."""

    kind: Literal["nlirg"]
    max_lr: float = Field(1.0, gt=0)
    """Height of the curve: the weight of a token that is fully learned from."""
    x0: float = Field(1.2, ge=0)
    """Loss in nats at which the rising branch reaches half its height."""
    k: float = Field(1.7, gt=0)
    """Steepness of the rising branch."""
    min_lr: float = Field(5.0e-8, ge=0)
    """Added to the falling branch, so that hard tokens keep a little weight."""
    loss_threshold: float = Field(3.0, gt=0)
    """Loss at which the falling branch takes over."""
    loss_deadline: float = Field(15.0, gt=0)
    """Loss from which on a token is refused: weight 0."""
    hard_center: float = Field(6.2, gt=0)
    """Loss at which the falling branch is down to half its height."""
    hard_slope: float = Field(1.0, gt=0)
    """Steepness of the falling branch."""

    @model_validator(mode="after")
    def zones_are_in_order(self) -> Self:
        if self.loss_deadline <= self.loss_threshold:
            raise ValueError("loss_deadline must be above loss_threshold")
        return self


class NlirgEntropyLoss(WeightedLoss):
    """NLIRG that also uses the entropy, to spot confident errors; see docs/guide/losses.md."""

    kind: Literal["nlirg_entropy"]
    max_lr: float = Field(1.0, gt=0)
    """Height of the curve: the weight of a token that is fully learned from."""
    x0: float = Field(1.2, ge=0)
    """Loss in nats at which the weight rises to half its height."""
    k: float = Field(1.7, gt=0)
    """Steepness of the rise."""
    sure_center: float = Field(4.0, gt=0)
    """Loss minus entropy, in nats, at which a token counts half as sure and wrong."""
    sure_slope: float = Field(1.5, gt=0)
    """Steepness of the fall around it."""
    floor: float = Field(0.05, ge=0, le=1)
    """Share of the weight that a sure and wrong token keeps: what every row says is learned."""
    loss_deadline: float = Field(15.0, gt=0)
    """Loss from which on a token is refused: weight 0."""


class DftLoss(WeightedLoss):
    """Dynamic Fine-Tuning: every target counts by its probability; see docs/guide/losses.md."""

    kind: Literal["dft"]


class EaftLoss(WeightedLoss):
    """Entropy-Adaptive Fine-Tuning: learn where the model is unsure; see docs/guide/losses.md."""

    kind: Literal["eaft"]
    alpha: float = Field(1.0, gt=0)
    """Power of the normalised entropy. Above 1 the sure tokens count still less."""


Loss = Annotated[
    PlainLoss | NlirgLoss | NlirgEntropyLoss | DftLoss | EaftLoss, Field(discriminator="kind")
]


class Checkpoint(Section):
    """When the run is saved; validation happens at the same moments."""

    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """epoch, or a number of updates."""
    keep: int = Field(2, ge=1)
    """How many to keep. The best one by validation loss is always among them."""


class EarlyStopping(Section):
    """Stop when validation no longer gets better."""

    patience: int = Field(3, ge=1)
    """Validations in a row without a better loss before the run stops."""
    metric: Literal["eval_loss", "drift"] = "eval_loss"
    """drift: only those count in which the model also moved further from its base."""


class TrainSection(Section):
    """How it is learned."""

    stage: Literal["pretrain", "cpt", "sft"] = "sft"
    """pretrain: a model from scratch. cpt: a base on texts. sft: a base on conversations."""
    epochs: int | None = Field(None, ge=1)
    """Times that every target is learned from. 3 when neither it nor max_steps is given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer updates after which the run ends. With epochs too, whichever comes first."""
    batch_size: int = Field(4, ge=1)
    """Examples, or packed rows, per process and micro-step."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-steps per optimizer update. It saves memory and cannot change a result."""
    learning_rate: float = Field(1.0e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """Course of the learning rate."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the updates over which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Longest gradient; longer ones are shortened to it. 0 switches clipping off."""
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ] = "adamw_torch"
    """Optimizer, by transformers' names. 8bit: remembers in 8 bits, a quarter of the memory. paged:
    its memory moves to the machine's where the GPU's is full. Both need bitsandbytes."""
    token_batch: int = Field(0, ge=0)
    """Targets of one response per update, in order; 0 = all targets of the step's examples."""
    order: Literal["shuffle", "as_written"] = "shuffle"
    """shuffle anew each epoch, or keep the order of the files."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of storing them: less memory, about a third slower."""
    torch_compile: bool = False
    """Compile the layers at the first step, which takes minutes: for long runs."""
    checkpoint: Checkpoint = Checkpoint()
    early_stopping: EarlyStopping | None = None
    spikes: Spikes = Spikes()
    log_every: int = Field(10, ge=1)
    """Updates between two records of metrics.jsonl."""
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "mlflow"]] = Field([])
    """Where the records go besides."""

    @property
    def num_epochs(self) -> int | None:
        """Epochs of the run; None where max_steps alone ends it."""
        return 3 if self.epochs is None and self.max_steps is None else self.epochs


class Recipe(Section):
    """One file that alone describes a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder: letters, digits, dot, dash and underscore."""
    output: Path | None = None
    """The run folder, relative to where the command runs; default outputs/<name>."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Start of every random choice."""
    model: ModelSection
    tuning: Tuning = LoraTuning()
    data: DataSection
    loss: Loss = PlainLoss()
    keep: Keep = NoKeep()
    drift: DriftSection = DriftSection()
    train: TrainSection = TrainSection()
    distributed: DistributedSection = DistributedSection()
    sort: SortSection = SortSection()
    eval: EvalSection = EvalSection()
    merge: MergeSection = MergeSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="after")
    def a_new_model_is_pretrained(self) -> Self:
        scratch = self.model.scratch is not None
        if scratch != (self.train.stage == "pretrain"):
            raise ValueError(
                'model.scratch and train.stage "pretrain" need each other: '
                "random weights are pretrained, a base is not"
            )
        if scratch and self.tuning.kind != "full":
            raise ValueError("random weights must all be trained; set tuning.kind to full")
        return self

    @model_validator(mode="after")
    def packing_or_token_batches(self) -> Self:
        if self.data.packing and self.train.token_batch:
            raise ValueError(
                "data.packing and train.token_batch cannot be combined; remove one: "
                "a token batch walks through one example at a time"
            )
        return self

    @model_validator(mode="after")
    def memory_can_be_shared_out(self) -> Self:
        conflict = self.distributed.conflict(
            tuning=self.tuning.kind,
            optimizer=self.train.optimizer,
            torch_compile=self.train.torch_compile,
            keep=self.keep.kind,
        )
        if conflict is not None:
            raise ValueError(conflict)
        return self

    @model_validator(mode="after")
    def it_is_merged_as_it_was_trained(self) -> Self:
        tuning, stored = self.tuning, self.merge.as_trained
        if not isinstance(tuning, QloraTuning) or stored is None:
            return self
        if (stored.quant_type, stored.double_quant) != (tuning.quant_type, tuning.double_quant):
            raise ValueError(
                f"merge.as_trained says {stored.quant_type}, double_quant {stored.double_quant}, "
                f"but tuning {tuning.quant_type}, double_quant {tuning.double_quant}; "
                "make them equal"
            )
        return self

    @model_validator(mode="after")
    def only_a_base_can_be_kept(self) -> Self:
        if self.model.scratch is not None and self.keep.kind != "none":
            raise ValueError("random weights know nothing to keep; set keep.kind to none")
        return self

    @model_validator(mode="after")
    def the_strength_of_keep_stands_beside_a_mean_over_targets(self) -> Self:
        if self.keep.kind != "none" and self.loss.normalize == "weights":
            raise ValueError(
                f"loss.normalize: weights and keep.kind: {self.keep.kind} cannot be combined: "
                "the strength of keep is beside a mean over targets"
            )
        return self

    @model_validator(mode="after")
    def kept_rows_leave_room_for_the_field(self) -> Self:
        rows = self.train.batch_size * self.train.gradient_accumulation_steps
        if isinstance(self.keep, HeldToRows) and rows < 2:
            raise ValueError(
                f"keep.kind: {self.keep.kind} needs two examples or more in an update; "
                "raise train.batch_size or train.gradient_accumulation_steps"
            )
        return self

    @model_validator(mode="after")
    def a_gauge_that_stops_the_run_is_on(self) -> Self:
        stopping = self.train.early_stopping
        if stopping is not None and stopping.metric == "drift":
            if self.model.scratch is not None:
                raise ValueError("early_stopping.metric: drift needs a base to drift from")
            if not self.drift.rows:
                raise ValueError("early_stopping.metric: drift needs drift.rows of 1 or more")
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run leaves everything, see run_dir.py."""
        return self.output or Path("outputs") / self.name
