"""The recipe: every key, its meaning, its limits and its default.

This file holds the losses of `loss` over tokens, `train` and the recipe itself; preference.py holds
the losses over pairs, rl.py those over rewards, and each other section has a file of its name.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from yrunner.recipe.schema.compare import CompareSection
from yrunner.recipe.schema.data import DataSection
from yrunner.recipe.schema.distributed import DistributedSection
from yrunner.recipe.schema.eval import EvalSection, check_names
from yrunner.recipe.schema.keep import DriftSection, HeldToRows, Keep, NoKeep
from yrunner.recipe.schema.merge import MergeSection
from yrunner.recipe.schema.model import LoraTuning, ModelSection, QloraTuning, Tuning
from yrunner.recipe.schema.preference import (
    BradleyTerryLoss,
    DpoLoss,
    KtoLoss,
    OrpoLoss,
    SimpoLoss,
)
from yrunner.recipe.schema.rewards import RewardSection, XmlReward
from yrunner.recipe.schema.rl import GrpoLoss, PpoLoss, RlooLoss, RolloutSection
from yrunner.recipe.schema.section import Section
from yrunner.recipe.schema.sort import SortSection
from yrunner.recipe.schema.teacher import TeacherSection

LAST_POLYNOMIAL_RATE = 1e-7
"""Where transformers' polynomial schedule ends, which must be below the learning rate."""


class Spikes(Section):
    """A loss far above that of the preceding updates."""

    window: int = Field(100, ge=10)
    """Number of preceding updates to compare with. Detection starts after a tenth of it."""
    deviations: float = Field(10.0, gt=0)
    """Distance from the median that counts as a spike, in robust standard deviations: 1.48 times
    the median absolute deviation, or at least a twentieth of the median. A rise of less than 0.25
    nats per target is never one."""
    action: Literal["warn", "stop", "ignore"] = "warn"
    """`stop`: end the run before the optimizer step, as for a NaN loss."""


class WeightedLoss(Section):
    """Keys shared by all kinds of loss."""

    normalize: Literal["targets", "weights"] = "targets"
    """What the summed loss of an update is divided by: its number of targets, or the sum of their
    weights, so that updates with small weights are as large as others."""


class PlainLoss(WeightedLoss):
    """Cross-entropy: every target has the same weight."""

    kind: Literal["plain"] = "plain"


class NlirgLoss(WeightedLoss):
    """Cross-entropy, weighted per token by its current loss; see docs/guide/nlirg.md."""

    kind: Literal["nlirg"]
    max_lr: float = Field(1.0, gt=0)
    """Height of the curve: the weight of a token that is fully learned from."""
    x0: float = Field(1.2, ge=0)
    """Loss in nats at which the rising branch reaches half of max_lr."""
    k: float = Field(1.7, gt=0)
    """Steepness of the rising branch."""
    min_lr: float = Field(5.0e-8, ge=0)
    """Added to the falling branch, so that hard tokens keep a small weight."""
    loss_threshold: float = Field(3.0, gt=0)
    """Loss in nats above which the falling branch applies."""
    loss_deadline: float = Field(15.0, gt=0)
    """Loss from which on a token is refused: weight 0."""
    hard_center: float = Field(6.2, gt=0)
    """Loss in nats at which the falling branch is down to half of max_lr."""
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
    """Loss in nats at which the weight rises to half of max_lr."""
    k: float = Field(1.7, gt=0)
    """Steepness of the rise."""
    sure_center: float = Field(4.0, gt=0)
    """Loss minus entropy, in nats, at which a token is halfway to a confident error."""
    sure_slope: float = Field(1.5, gt=0)
    """Steepness of the fall around sure_center."""
    floor: float = Field(0.05, ge=0, le=1)
    """Share of its weight that a confident error keeps, so that facts in many rows are learned."""
    loss_deadline: float = Field(15.0, gt=0)
    """Loss from which on a token is refused: weight 0."""


class DftLoss(WeightedLoss):
    """Dynamic Fine-Tuning: a target's weight is its probability; see docs/guide/losses.md."""

    kind: Literal["dft"]


class EaftLoss(WeightedLoss):
    """Entropy-Adaptive Fine-Tuning: confident tokens weigh little; see docs/guide/losses.md."""

    kind: Literal["eaft"]
    alpha: float = Field(1.0, gt=0)
    """Exponent of the normalised entropy. Above 1, confident tokens get even less weight."""


TokenLoss = PlainLoss | NlirgLoss | NlirgEntropyLoss | DftLoss | EaftLoss
PreferenceLoss = DpoLoss | SimpoLoss | OrpoLoss | KtoLoss
PolicyLoss = GrpoLoss | RlooLoss | PpoLoss
Loss = Annotated[
    TokenLoss | PreferenceLoss | BradleyTerryLoss | PolicyLoss, Field(discriminator="kind")
]


class Checkpoint(Section):
    """When checkpoints are saved and validation runs."""

    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """`epoch`, or a number of updates."""
    keep: int = Field(2, ge=1)
    """How many checkpoints to keep, always including the one with the best validation loss."""


class EarlyStopping(Section):
    """Stop when validation no longer improves."""

    patience: int = Field(3, ge=1)
    """Number of consecutive validations without a better loss after which the run stops."""
    metric: Literal["eval_loss", "drift"] = "eval_loss"
    """`drift`: count only validations at which the model has also drifted further from its base."""


class TrainSection(Section):
    """How the model is trained."""

    stage: Literal["pretrain", "cpt", "sft", "preference", "reward", "rl"] = "sft"
    """`pretrain`: a new model. `cpt`: a base, on plain text. `sft`: a base, on conversations.
    `preference`: a base, on better and worse answers. `reward`: a model that scores answers, on the
    same rows. `rl`: a base, on answers of its own that `rewards` judge."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the training data. Default 3 if max_steps is not set either."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer updates. If epochs is set too, the run ends at whichever comes first."""
    batch_size: int = Field(4, ge=1)
    """Examples, packed rows or answers per process and micro-batch."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer update. Splitting an update saves memory and does not change
    results."""
    learning_rate: float = Field(1.0e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """Learning rate schedule."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the updates over which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Maximum gradient norm for clipping; 0 disables clipping."""
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "adagrad",
        "rmsprop",
        "sgd",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "ademamix_8bit",
    ] = "adamw_torch"
    """Optimizer, by its name in transformers. `8bit`: state in 8 bits, a quarter of the memory.
    `paged`: state moves to CPU memory when the GPU is full. These, `lion` and `ademamix` need
    bitsandbytes. `lion` wants a tenth to a third of AdamW's learning rate."""
    token_batch: int = Field(0, ge=0)
    """Targets of one response per update, in order; 0: all targets of the update's examples."""
    order: Literal["shuffle", "as_written"] = "shuffle"
    """`shuffle`: a new random order each epoch. `as_written`: the order of the files."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: less memory, about a third slower."""
    torch_compile: bool = False
    """Compile the layers at the first step. This takes minutes, so use it for long runs."""
    checkpoint: Checkpoint = Checkpoint()
    validate_every: Literal["epoch"] | Annotated[int, Field(ge=1)] | None = None
    """`epoch`, or a number of updates between validations, if not with the checkpoints. The best
    one so far is then saved at once, and so is the last update."""
    result: Literal["best", "last"] = "best"
    """Which update `model/` is: `best` by plain validation loss, or the `last`. Without validation
    rows it is the last."""
    early_stopping: EarlyStopping | None = None
    spikes: Spikes = Spikes()
    log_every: int = Field(10, ge=1)
    """Number of updates between two records in metrics.jsonl."""
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "mlflow"]] = Field([])
    """Trackers that also receive the records of metrics.jsonl."""

    @model_validator(mode="after")
    def polynomial_falls_to_a_rate_above_zero(self) -> Self:
        if self.lr_scheduler == "polynomial" and self.learning_rate <= LAST_POLYNOMIAL_RATE:
            raise ValueError(
                f"lr_scheduler polynomial ends at {LAST_POLYNOMIAL_RATE:g}; "
                "raise learning_rate above that, or use cosine"
            )
        return self

    @property
    def num_epochs(self) -> int | None:
        """Epochs of the run; None if only max_steps ends it."""
        return 3 if self.epochs is None and self.max_steps is None else self.epochs


def _stage_of(loss: Any) -> str | None:
    """The only stage of a loss; None for one over tokens."""
    if isinstance(loss, TokenLoss):
        return None
    if isinstance(loss, BradleyTerryLoss):
        return "reward"
    return "rl" if isinstance(loss, PolicyLoss) else "preference"


class Recipe(Section):
    """The complete description of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder: letters, digits, dot, dash and underscore."""
    output: Path | None = None
    """The run folder, relative to where the command runs; default outputs/<name>."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Random seed."""
    model: ModelSection
    tuning: Tuning = LoraTuning()
    data: DataSection
    loss: Loss = PlainLoss()
    teacher: TeacherSection | None = None
    rewards: tuple[RewardSection, ...] = ()
    rollout: RolloutSection = RolloutSection()
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
                'model.scratch and train.stage "pretrain" require each other: '
                "pretrain starts from random weights, the other stages from a base"
            )
        if scratch and self.tuning.kind != "full":
            raise ValueError("random weights must all be trained; set tuning.kind to full")
        return self

    @model_validator(mode="after")
    def each_stage_has_its_losses(self) -> Self:
        stage, loss = self.train.stage, self.loss
        if stage == "preference" and not isinstance(loss, PreferenceLoss):
            raise ValueError(
                f"train.stage preference learns from pairs, and loss.kind {loss.kind} from tokens; "
                "set loss.kind to dpo, simpo, orpo or kto"
                if isinstance(loss, TokenLoss)
                else f"loss.kind {loss.kind} belongs to train.stage reward; set that"
            )
        if stage == "reward" and not isinstance(loss, BradleyTerryLoss):
            raise ValueError(
                f"train.stage reward needs loss.kind bradley_terry, not {loss.kind}; set that"
            )
        if stage == "rl" and not isinstance(loss, PolicyLoss):
            raise ValueError(
                f"train.stage rl learns from rewards, which loss.kind {loss.kind} does not read; "
                "set loss.kind to grpo, rloo or ppo"
            )
        needed = _stage_of(loss)
        if needed is not None and stage != needed:
            raise ValueError(
                f"loss.kind {loss.kind} belongs to train.stage {needed}; set that, or loss.kind to "
                "plain"
            )
        return self

    @model_validator(mode="after")
    def answers_are_rewarded_as_a_whole(self) -> Self:
        if self.train.stage != "rl":
            # A recipe that was written with every default has both.
            is_set = {"rewards": self.rewards, "rollout": self.rollout != RolloutSection()}
            given = [name for name, value in is_set.items() if value]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} belongs to train.stage rl; set that, or remove "
                    f"{'them' if len(given) > 1 else given[0]}"
                )
            return self
        if not self.rewards:
            raise ValueError(
                "train.stage rl needs rewards, a list of what makes an answer good, such as "
                "rewards: [{kind: exact}]"
            )
        if self.rollout.generations == 1 and not isinstance(self.loss, PpoLoss):
            raise ValueError(
                f"rollout.generations 1 leaves nothing to compare an answer with; loss.kind "
                f"{self.loss.kind} needs at least 2, or set loss.kind to ppo"
            )
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("every reward has weight 0: nothing is learned; raise one of them")
        others = {
            "data.packing": self.data.packing,
            f"data.targets {self.data.targets}": self.data.targets != "assistant",
            "train.token_batch": self.train.token_batch > 0,
        }
        found = [name for name, is_set in others.items() if is_set]
        if found:
            raise ValueError(
                f"train.stage rl cannot be combined with {' and '.join(found)}; remove that: every "
                "process writes answers with the whole model, and whole groups of them share an "
                "update"
            )
        return self

    @model_validator(mode="after")
    def a_critic_compares_no_groups(self) -> Self:
        if isinstance(self.loss, PpoLoss) and self.rollout.resample:
            raise ValueError(
                "loss.kind ppo and rollout.resample cannot be combined; remove resample: a critic "
                "learns from groups of equal rewards too"
            )
        return self

    @model_validator(mode="after")
    def a_critic_starts_from_an_adapter(self) -> Self:
        if isinstance(self.loss, PpoLoss) and self.loss.critic is not None:
            if self.tuning.kind in ("full", "freeze"):
                raise ValueError(
                    f"loss.critic and tuning.kind {self.tuning.kind} cannot be combined; remove "
                    "critic, or set tuning.kind to lora: it names an adapter on a frozen base"
                )
        return self

    @model_validator(mode="after")
    def answers_are_compared_as_a_whole(self) -> Self:
        if self.learns_from_pairs and self.train.token_batch:
            raise ValueError(
                f"train.token_batch and train.stage {self.train.stage} cannot be combined; remove "
                "token_batch: answers are compared as a whole"
            )
        if self.learns_from_pairs and self.data.targets == "all":
            raise ValueError(
                f"data.targets: all and train.stage {self.train.stage} cannot be combined; remove "
                "targets: both sides have the same prompt, so only their answers are learned from"
            )
        return self

    @model_validator(mode="after")
    def weights_of_tokens_need_the_reference_at_hand(self) -> Self:
        adapter = getattr(self.tuning, "adapter", None)
        has_reference = self.tuning.kind not in ("full", "freeze") and adapter is None
        if isinstance(self.loss, DpoLoss) and self.loss.weigh and not has_reference:
            named = "tuning.adapter" if adapter else f"tuning.kind {self.tuning.kind}"
            raise ValueError(
                f"loss.weigh and {named} cannot be combined: it needs the reference's loss of "
                "every token, which only a run with a new adapter has at hand; set tuning.kind to "
                "lora or qlora without an adapter, or remove weigh"
            )
        return self

    @model_validator(mode="after")
    def rewards_can_be_told_apart(self) -> Self:
        check_names([each.shown_name for each in self.rewards], "rewards")
        forms = [each for each in self.rewards if isinstance(each, XmlReward)]
        known = list(dict.fromkeys(tag for each in forms for tag in each.tags))
        for number, each in enumerate(self.rewards):
            tag = getattr(each, "tag", None)
            if known and tag is not None and tag not in known:
                near = get_close_matches(tag, known, n=1)
                hint = f', did you mean "{near[0]}"?' if near else ""
                raise ValueError(
                    f'rewards.{number}.tag is "{tag}", but the tags of the reward '
                    f"{forms[0].shown_name} are {', '.join(known)}{hint}"
                )
        return self

    @model_validator(mode="after")
    def a_reward_model_is_saved_whole_and_writes_nothing(self) -> Self:
        if self.train.stage != "reward":
            return self
        stopping = self.train.early_stopping
        problems = {
            "tuning.adapter: that of a language model has no score. Run yrun merge, and name its "
            "result in model.base": getattr(self.tuning, "adapter", None) is not None,
            "tuning.modules_to_save: a reward model is saved with its adapter merged. Remove "
            "it": bool(getattr(self.tuning, "modules_to_save", None)),
            f"keep.kind {self.keep.kind}: a reward model writes nothing that could be kept. Remove "
            "it": self.keep.kind != "none",
            "early_stopping.metric drift: a reward model predicts no tokens. Use eval_loss": (
                stopping is not None and stopping.metric == "drift"
            ),
        }
        found = [problem for problem, is_set in problems.items() if is_set]
        if found:
            raise ValueError(f"train.stage reward cannot be combined with {found[0]}")
        return self

    @model_validator(mode="after")
    def pairs_are_sorted_by_their_margin(self) -> Self:
        sort, stage = self.sort, self.train.stage
        if self.learns_from_pairs and (sort.score not in (None, "margin") or sort.also):
            named = "also" if sort.score in (None, "margin") else f"score: {sort.score}"
            raise ValueError(
                f"sort.{named} judges single answers, but train.stage {stage} learns from better "
                "and worse ones, which are sorted by margin; remove it"
            )
        if self.learns_from_pairs and sort.clusters.keep is not None:
            raise ValueError(
                f"sort.clusters.keep and train.stage {stage} cannot be combined: pairs are not "
                "clustered; remove it"
            )
        if not self.learns_from_pairs and sort.score == "margin":
            raise ValueError(
                f"sort.score: margin compares better and worse answers, but train.stage {stage} "
                "learns from single ones; name another score, or set train.stage to preference"
            )
        return self

    @model_validator(mode="after")
    def a_teacher_has_a_student(self) -> Self:
        if self.teacher is not None and self.train.stage not in ("sft", "cpt"):
            raise ValueError(
                f"teacher and train.stage {self.train.stage} cannot be combined; remove teacher: "
                "it predicts the tokens of sft and cpt"
            )
        if self.teacher is None or getattr(self.loss, "normalize", None) != "weights":
            return self
        if not self.teacher.weigh_teacher:
            raise ValueError(
                "loss.normalize: weights and teacher cannot be combined: teacher.weight is "
                "relative to a mean over targets; remove normalize, or set teacher.weigh_teacher: "
                "true"
            )
        if self.teacher.on_policy:
            raise ValueError(
                "loss.normalize: weights and teacher.on_policy cannot be combined; remove one: "
                "what the student writes has no label to weigh"
            )
        return self

    @model_validator(mode="after")
    def vllm_writes_with_an_adapter(self) -> Self:
        if self.rollout.engine != "vllm":
            if self.rollout.gpu_share != RolloutSection().gpu_share:
                raise ValueError("rollout.gpu_share is for engine vllm; set that, or remove it")
            return self
        tuning = self.tuning
        problems = {
            f"tuning.kind {tuning.kind}": tuning.kind != "lora",
            "tuning.variant dora": getattr(tuning, "variant", "plain") == "dora",
            "tuning.train_tokens": bool(getattr(tuning, "train_tokens", None)),
            "tuning.modules_to_save": bool(getattr(tuning, "modules_to_save", None)),
            "tuning.rank above 512": getattr(tuning, "rank", 0) > 512,
            "several processes or DeepSpeed": self.distributed.is_launched,
        }
        found = [name for name, is_set in problems.items() if is_set]
        if found:
            raise ValueError(
                f"rollout.engine vllm cannot be combined with {' and '.join(found)}: it writes in "
                "the one process that trains, and is given a plain LoRA after each update; set "
                "engine: transformers, or tuning.kind lora"
            )
        return self

    @model_validator(mode="after")
    def a_student_can_write(self) -> Self:
        if self.teacher is None or not self.teacher.on_policy:
            return self
        section = self.distributed.deepspeed
        problems = {
            "train.stage cpt": (self.train.stage == "cpt", "a text has no answer"),
            "data.packing": (self.data.packing, "the length of an answer is not known before"),
            "train.token_batch": (
                self.train.token_batch > 0,
                "an answer is written as a whole",
            ),
            "data.targets: all": (self.data.targets == "all", "questions are targets there"),
            "deepspeed.stage 3": (
                section is not None and section.stage == 3,
                "the student writes with whole weights",
            ),
        }
        for name, (is_set, reason) in problems.items():
            if is_set:
                raise ValueError(
                    f"teacher.on_policy and {name} cannot be combined; remove one: {reason}"
                )
        return self

    @model_validator(mode="after")
    def new_tokens_are_trained(self) -> Self:
        tuning, new = self.tuning, self.model.new_tokens
        trains_all = tuning.kind == "full" or getattr(tuning, "embeddings", False)
        trained = getattr(tuning, "train_tokens", [])
        if trains_all or getattr(tuning, "modules_to_save", None) or set(new) <= set(trained):
            return self
        raise ValueError(
            "model.new_tokens mean nothing to the model before they are trained; name them in "
            "tuning.train_tokens too, or train the embeddings"
        )

    @model_validator(mode="after")
    def packing_or_token_batches(self) -> Self:
        if self.data.packing and self.train.token_batch:
            raise ValueError(
                "data.packing and train.token_batch cannot be combined; remove one: "
                "token batches take one example at a time"
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
        section, tuning = self.distributed.deepspeed, self.tuning
        if section is not None and section.stage == 3 and getattr(tuning, "train_tokens", None):
            raise ValueError(
                "tuning.train_tokens needs whole embeddings, but ZeRO stage 3 shards them; "
                "use deepspeed.stage 2 or 1"
            )
        return self

    @model_validator(mode="after")
    def it_is_merged_as_it_was_trained(self) -> Self:
        tuning, stored = self.tuning, self.merge.as_trained
        if not isinstance(tuning, QloraTuning) or stored is None:
            return self
        if (stored.quant_type, stored.double_quant) != (tuning.quant_type, tuning.double_quant):
            raise ValueError(
                f"merge.as_trained has {stored.quant_type}, double_quant {stored.double_quant}, "
                f"but tuning has {tuning.quant_type}, double_quant {tuning.double_quant}; "
                "make them equal"
            )
        return self

    @model_validator(mode="after")
    def only_a_base_can_be_kept(self) -> Self:
        if self.model.scratch is not None and self.keep.kind != "none":
            raise ValueError("random weights have nothing to keep; set keep.kind to none")
        return self

    @model_validator(mode="after")
    def the_strength_of_keep_is_relative_to_a_mean_over_targets(self) -> Self:
        if self.keep.kind != "none" and getattr(self.loss, "normalize", None) == "weights":
            raise ValueError(
                f"loss.normalize: weights and keep.kind: {self.keep.kind} cannot be combined: "
                "keep.strength is relative to a mean over targets"
            )
        return self

    @model_validator(mode="after")
    def kept_rows_leave_room_for_the_field(self) -> Self:
        rows = self.train.batch_size * self.train.gradient_accumulation_steps
        if isinstance(self.keep, HeldToRows) and rows < 2:
            raise ValueError(
                f"keep.kind: {self.keep.kind} needs at least two examples per update; "
                "raise train.batch_size or train.gradient_accumulation_steps"
            )
        return self

    @model_validator(mode="after")
    def early_stopping_looks_at_validations(self) -> Self:
        if self.train.early_stopping is not None and not self.data.validates:
            raise ValueError(
                "train.early_stopping needs validation rows; "
                "set data.validation or data.validation_share"
            )
        return self

    @model_validator(mode="after")
    def modules_are_saved_as_a_whole(self) -> Self:
        saved = getattr(self.tuning, "modules_to_save", None)
        if saved and self.distributed.deepspeed is not None:
            raise ValueError(
                "tuning.modules_to_save and distributed.deepspeed cannot be combined; remove one: "
                "DeepSpeed shards the weights that are saved with the adapter"
            )
        return self

    @model_validator(mode="after")
    def lora_plus_has_whole_weights(self) -> Self:
        ratio = getattr(self.tuning, "lora_plus_ratio", 1.0)
        if ratio != 1 and self.distributed.deepspeed is not None:
            raise ValueError(
                "tuning.lora_plus_ratio and distributed.deepspeed cannot be combined; remove one: "
                "a configuration of DeepSpeed has one learning rate"
            )
        return self

    @model_validator(mode="after")
    def validations_need_rows(self) -> Self:
        if self.train.validate_every is not None and not self.data.validates:
            raise ValueError(
                "train.validate_every needs validation rows; "
                "set data.validation or data.validation_share"
            )
        return self

    @model_validator(mode="after")
    def a_gauge_that_stops_the_run_is_on(self) -> Self:
        stopping = self.train.early_stopping
        if stopping is not None and stopping.metric == "drift":
            if self.model.scratch is not None:
                raise ValueError("early_stopping.metric: drift needs a base to drift from")
            if not self.drift.rows:
                raise ValueError("early_stopping.metric: drift needs drift.rows of at least 1")
        return self

    @property
    def learns_from_pairs(self) -> bool:
        """Whether it learns from better and worse answers, and not from every token alike."""
        return self.train.stage in ("preference", "reward")

    @property
    def learns_from_tokens(self) -> bool:
        """Whether its loss is over the tokens of given texts."""
        return isinstance(self.loss, TokenLoss)

    @property
    def token_loss(self) -> TokenLoss:
        """How targets are weighed where they are measured: all alike for a loss over pairs."""
        return self.loss if isinstance(self.loss, TokenLoss) else PlainLoss()

    @property
    def run_folder(self) -> Path:
        """The folder of the run; see `RunDir`."""
        # os.path: Path.expanduser raises for "~nobody".
        return Path(os.path.expanduser(self.output or Path("outputs") / self.name))
