"""The model that a recipe trains, and its trainer."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.assembly.rl.judges import add_critic_of, rewards_beside
from yrunner.assembly.rl.rollouts import RolloutsFile, score_answers, write_answers
from yrunner.assembly.rl.vllm import VllmWriter
from yrunner.assembly.run import Run
from yrunner.console import progress, say
from yrunner.data.batching.answers import AnswerBatches, ComparedRows
from yrunner.data.batching.batches import Batches
from yrunner.data.batching.collate import BatchLayout, all_in_one_row, choose_layout
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.taught import TaughtBatches
from yrunner.distributed.collectives import num_ranks, this_rank
from yrunner.errors import Interrupted
from yrunner.losses.score_head import CRITIC, add_score_head, attach_scores
from yrunner.models.errors import silence_libraries
from yrunner.models.layers.example_attention import BY_EXAMPLE, attend_by_example
from yrunner.models.limits import (
    branches_at_a_mask,
    can_be_tried,
    check_causal,
    check_isolation,
    isolates_examples,
)
from yrunner.models.load import check_vocabulary, load_model, without_zero3
from yrunner.models.quantization import quantization_config
from yrunner.models.reward import ADAPTER_FOLDER, as_classifier, save_score_adapter
from yrunner.models.save import ModelCard, save_model
from yrunner.models.scratch import build_model
from yrunner.models.tuning import apply_tuning, ids_to_train
from yrunner.process import seemingly_absent
from yrunner.recipe.schema.model import AdapterTuning, QloraTuning
from yrunner.recipe.schema.preference import BradleyTerryLoss, KtoLoss
from yrunner.recipe.schema.recipe import PolicyLoss, PreferenceLoss, Recipe
from yrunner.recipe.schema.rewards import RewardModelReward
from yrunner.recipe.schema.rl import PpoLoss
from yrunner.rewards.completion import Reward
from yrunner.storage.run_dir import RunDir
from yrunner.training.arguments import make_arguments, token_weight
from yrunner.training.callbacks import Cadence, ReturnFreedMemory
from yrunner.training.distillation.objective import TaughtObjective
from yrunner.training.distillation.teacher import LiveTeacher, Teaching
from yrunner.training.loop import Trainer
from yrunner.training.memory.oom_probe import rehearse
from yrunner.training.metrics import MetricsFile
from yrunner.training.objective import Objective, TargetObjective
from yrunner.training.preference.answers import compares_with_reference
from yrunner.training.preference.objective import PreferenceObjective
from yrunner.training.preference.reference import Reference, measure_reference
from yrunner.training.preference.reward import RewardObjective
from yrunner.training.progress import LiveProgress
from yrunner.training.rl.batches import RolloutBatches
from yrunner.training.rl.collect import Collector, WriteAnswers, settings_of
from yrunner.training.rl.objective import PolicyObjective
from yrunner.training.rl.token_samples import TokenSamples
from yrunner.training.spike_guard import SpikeGuard
from yrunner.training.trackers import TensorBoard, tracker_callbacks


def untrained_model(run: Run) -> Any:
    """The model before its first update: loaded or newly built, prepared for its tuning."""
    recipe = run.recipe
    # Under mixed precision, apply_tuning keeps trained weights in float32.
    if recipe.model.scratch is not None:
        model: Any = build_model(recipe.model.scratch.config, run.tokenizer, recipe.seed)
    else:
        model = load_model(
            run.base_source,
            dtype=run.dtype,
            attention=recipe.model.attention,
            trust_remote_code=recipe.model.trust_remote_code,
            quantization=_quantization(run),
        )
    check_vocabulary(model, run.tokenizer)
    set_seed(recipe.seed)
    if recipe.train.stage == "reward":
        add_score_head(model)
        attach_scores(model)
    model = tune(run, model)
    if isinstance(recipe.loss, PpoLoss):
        add_critic_of(recipe.loss, model, run.origin if recipe.loss.critic else None)
    return model


def tune(run: Run, model: Any) -> Any:
    """Prepare a loaded model to be trained as the recipe says."""
    tuning = run.recipe.tuning
    return apply_tuning(model, tuning, ids_to_train(tuning, run.tokenizer))


def _quantization(run: Run) -> Any:
    tuning = run.recipe.tuning
    if not isinstance(tuning, QloraTuning) or run.stored_quantization is not None:
        return None
    return quantization_config(tuning.quant_type, double_quant=tuning.double_quant, dtype=run.dtype)


def has_base_beneath(recipe: Recipe) -> bool:
    """Whether switching off the adapter gives the model before training."""
    tuning = recipe.tuning
    return tuning.kind not in ("full", "freeze") and getattr(tuning, "adapter", None) is None


def reference_in_words(recipe: Recipe) -> str | None:
    """Which model the trained one is compared with, and what that costs; None if none."""
    if isinstance(recipe.loss, PolicyLoss):
        if not settings_of(recipe.loss).beta:
            return None
        if has_base_beneath(recipe):
            return "the base, adapter off: one more forward pass per rollout, no more memory"
        return "a copy of the model as the run begins: one more forward pass per rollout"
    if not compares_with_reference(recipe.loss):
        return None
    if has_base_beneath(recipe):
        return "the base, adapter off: one more forward pass per update, no more memory"
    start = "the model with the adapter that it starts from"
    if not isinstance(recipe.tuning, AdapterTuning):
        start = "the base"
    return f"{start}: every answer is scored once before training and kept, no more memory"


def critic_in_words(recipe: Recipe) -> str | None:
    """What says which rewards to expect, and what that costs; None without a critic."""
    if not isinstance(recipe.loss, PpoLoss):
        return None
    if isinstance(recipe.tuning, AdapterTuning):
        return (
            "a second adapter on the same base: twice the trained weights, their optimizer state "
            "and the activations, no second model"
        )
    return "one more layer on the model's own hidden states: hardly any memory, no second model"


@dataclass(frozen=True)
class TrainingTask:
    """What a trainer learns from, where it writes, and who takes part."""

    plan: Plan
    train: Sequence[Any]
    """Examples; pairs or rated answers for preferences."""
    folder: RunDir
    cadence: Cadence
    callbacks: Sequence[TrainerCallback]
    validation: Sequence[Any] = ()
    reference: Reference | None = None
    """What the reference makes of the answers, unless the model itself can tell."""
    teaching: Teaching | None = None
    """What is learned beside the labels; None leaves the recipe's `teacher` out."""
    reference_model: Any = None
    """A copy of the model as the run began, for rollouts; None: it is the base beneath."""


def training_arguments(
    run: Run, plan: Plan, micro_steps: int, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """transformers' arguments. Under ZeRO-3 they have to be made before the model is loaded."""
    return make_arguments(
        run.recipe.train,
        folder=run.folder.checkpoints,
        name=run.recipe.name,
        num_updates=plan.num_updates,
        seed=run.recipe.seed,
        dtype=run.dtype,
        micro_steps=micro_steps,
        deepspeed=deepspeed,
    )


def run_trainer(
    run: Run,
    model: Any,
    plan: Plan,
    arguments: TrainingArguments,
    reference: Reference | None = None,
    teaching: Teaching | None = None,
) -> Trainer:
    """The trainer of a run: validated, logged, tracked and saved as its recipe says."""
    weight, _ = token_weight(run.recipe.token_loss)
    trackers = tracker_callbacks(run.recipe.train.trackers, run.folder.trackers, weight)
    task = TrainingTask(
        plan=plan,
        train=run.dataset.train,
        validation=run.dataset.validation,
        folder=run.folder,
        cadence=Cadence.of(run.recipe.train, plan),
        callbacks=[*_returning_memory(), MetricsFile(run.folder.metrics), *trackers],
        reference=reference,
        teaching=teaching,
        reference_model=_reference_model(run, model),
    )
    return make_trainer(run, model, arguments, task)


def _returning_memory() -> list[TrainerCallback]:
    """Where the processor's memory holds the activations."""
    return [] if torch.cuda.is_available() else [ReturnFreedMemory()]


def _reference_model(run: Run, model: Any) -> Any:
    """A copy of a model that is about to be trained on rollouts, if its loss needs one."""
    loss = run.recipe.loss
    if not isinstance(loss, PolicyLoss) or not settings_of(loss).beta:
        return None
    if has_base_beneath(run.recipe):
        return None
    if is_deepspeed_zero3_enabled():
        # `model` is sharded already, and every process measures with the whole reference.
        with without_zero3():
            return untrained_model(run).requires_grad_(False).eval()
    return copy.deepcopy(model).requires_grad_(False).eval()


def make_trainer(run: Run, model: Any, arguments: TrainingArguments, task: TrainingTask) -> Trainer:
    """A trainer by the recipe's tuning and loss."""
    recipe = run.recipe
    batches = _batches(run, task)
    objective = _objective(run, task, batches)
    # Before the trainer, which joins LoRA layers.
    rewards = load_rewards(run, model)
    trainer = Trainer(
        model,
        arguments,
        batches,
        objective,
        task.cadence,
        task.folder,
        torch_compile=recipe.train.torch_compile,
        lora_plus_ratio=getattr(recipe.tuning, "lora_plus_ratio", 1.0),
        critic_rate=getattr(recipe.loss, "critic_learning_rate", None),
        callbacks=task.callbacks,
    )

    if isinstance(batches, RolloutBatches):
        _connect_rollouts(run, trainer, batches, task, rewards)
    trainer.when_model_runs(lambda: _choose_layout(run, trainer, task.teaching))
    trainer.before_training.append(lambda: rehearse(trainer))
    return trainer


def load_rewards(run: Run, model: Any) -> list[Reward]:
    """What judges the answers of a model: reward models are adapters on its base, if they can."""
    sections = [each for each in run.recipe.rewards if isinstance(each, RewardModelReward)]
    if not sections or not isinstance(model, PeftModel):
        return run.load_rewards()
    return run.load_rewards(rewards_beside(sections, model, run.origin))


def _connect_rollouts(
    run: Run,
    trainer: Trainer,
    batches: RolloutBatches,
    task: TrainingTask,
    rewards: Sequence[Reward],
) -> None:
    """Let the trainer's model write the answers that it learns from."""
    recipe, model = run.recipe, trainer.model
    names = [reward.shown_name for reward in recipe.rewards]
    if task.reference_model is not None:
        task.reference_model.to(trainer.device)
    batches.collector = Collector(
        model,
        task.train,
        _writer(run, trainer),
        partial(score_answers, run.tokenizer, rewards),
        batches.loss,
        recipe.rollout,
        recipe.seed,
        run.tokenizer.pad_token_id,
        run.max_tokens,
        reference=task.reference_model,
        precision=lambda: mixed_precision(trainer, run.dtype),
        whole_model=nullcontext if trainer.zero is None else trainer.zero.whole_model,
    )
    batches.before_collecting.append(trainer.objective.meter.start)
    file = RolloutsFile(task.folder.rollouts, names, batches.buffer, recipe.rollout)
    trainer.callbacks.append(file)
    batches.watchers.append(file.note)
    if isinstance(trainer.objective, PolicyObjective):
        samples = TokenSamples(task.folder.rollout_tokens, batches.train)
        trainer.callbacks.append(samples)
        trainer.objective.samples = samples


def _writer(run: Run, trainer: Trainer) -> WriteAnswers:
    """What lets the trainer's model write answers."""

    def is_over() -> bool:
        return trainer.stop.cuts_off

    recipe, given = run.recipe, (trainer.model, run.tokenizer, run.recipe.rollout)
    if recipe.rollout.engine == "transformers":
        return partial(write_answers, *given, is_over=is_over)
    options = {
        "model": run.base_source,
        "dtype": str(run.dtype).removeprefix("torch."),
        "trust_remote_code": recipe.model.trust_remote_code,
        "max_model_len": recipe.data.max_length,
        "seed": recipe.seed,
    }
    return VllmWriter(*given, options, update=lambda: trainer.state.global_step, is_over=is_over)


def _objective(run: Run, task: TrainingTask, batches: Batches) -> Objective:
    recipe = run.recipe
    if isinstance(batches, RolloutBatches):
        return PolicyObjective(
            batches.loss,
            recipe.train.spikes,
            batches.buffer,
            [reward.shown_name for reward in recipe.rewards],
            generations=recipe.rollout.generations,
            temperature=recipe.rollout.temperature,
            resamples=recipe.rollout.resample > 0,
        )
    if isinstance(recipe.loss, PreferenceLoss):
        return PreferenceObjective(recipe.loss, recipe.train.spikes)
    if isinstance(recipe.loss, BradleyTerryLoss):
        return RewardObjective(recipe.loss, recipe.train.spikes)
    weight, loss_deadline = token_weight(recipe.token_loss)
    histograms = [it.histograms for it in task.callbacks if isinstance(it, TensorBoard)]
    options: dict[str, Any] = {
        "loss_deadline": loss_deadline,
        "normalize": recipe.token_loss.normalize,
        "guard": SpikeGuard(recipe.train.spikes),
        "histograms": next(iter(histograms), None),
    }
    section, teaching = recipe.teacher, task.teaching
    if section is None or teaching is None:
        return TargetObjective(weight, **options)
    assert isinstance(batches, TaughtBatches)
    return TaughtObjective(
        weight,
        teacher=teaching.teacher,
        divergence=teaching.divergence,
        teacher_share=section.weight,
        weigh_teacher=section.weigh_teacher,
        writer=teaching.writer and teaching.writer(batches),
        **options,
    )


def _batches(run: Run, task: TrainingTask) -> Batches:
    pad, rank = run.tokenizer.pad_token_id, this_rank()
    if isinstance(run.recipe.loss, PolicyLoss):
        return RolloutBatches(
            task.plan,
            task.train,
            task.validation,
            pad,
            rank,
            num_ranks(),
            loss=run.recipe.loss,
            rollout=run.recipe.rollout,
        )
    if not run.recipe.learns_from_pairs:
        kind = Batches if task.teaching is None else TaughtBatches
        return kind(task.plan, task.train, task.validation, pad, rank, num_ranks())
    train, validation = (compared(run, rows) for rows in (task.train, task.validation))
    if task.reference is not None:
        train.reference_RA = task.reference.train_RA
        validation.reference_RA = task.reference.validation_RA
    return AnswerBatches(task.plan, train, validation, pad, rank, num_ranks())


def compared_rows(run: Run) -> tuple[ComparedRows, ComparedRows]:
    """The pairs or rated answers to train and to validate on."""
    return compared(run, run.pairs.train), compared(run, run.pairs.validation)


def compared(run: Run, rows: Sequence[Any]) -> ComparedRows:
    """Pairs or rated answers, as the recipe's loss compares them."""
    return ComparedRows(rows, rated=isinstance(run.recipe.loss, KtoLoss))


def score_reference(run: Run, model: Any, *parts: ComparedRows) -> Reference:
    """The log-probabilities of the answers to train and to validate on, under a model."""
    enabled = run.dtype != torch.float32
    autocast = torch.autocast(model.device.type, dtype=run.dtype, enabled=enabled)
    with autocast, progress("answers under the reference, rows", sum(map(len, parts))) as advance:
        found = [
            measure_reference(
                model,
                part,
                pad_token_id=run.tokenizer.pad_token_id,
                max_tokens=run.max_tokens,
                advance=advance,
            )
            for part in parts
        ]
    return Reference(*found)


def train_to_the_end(trainer: Trainer, run: Run) -> None:
    """Train, and raise `Interrupted` where a signal stopped it; the checkpoint is complete then."""
    step = run.options.from_step
    checkpoint = None if step is None else run.folder.checkpoint(step)
    with trainer.stop.listening(), LiveProgress(run.recipe.name) as progress:
        trainer.callbacks.append(progress)
        with silence_libraries():
            trainer.train(checkpoint)
    stopping, state = run.recipe.train.early_stopping, trainer.state
    if trainer.stop.signal is not None:
        raise Interrupted(
            trainer.stop.signal,
            state.global_step,
            run.folder.folder,
            remedy=run.options.how_to_resume,
        )
    if stopping is not None and state.global_step < state.max_steps and this_rank() == 0:
        say(
            f"ended after update {state.global_step:,} of {state.max_steps:,}: train.early_stopping"
            f", metric {stopping.metric}, patience {stopping.patience}"
        )


def save_result(trainer: Trainer, run: Run, card: ModelCard, weights: Any) -> None:
    """Write `model/`. `weights` are those of the model where it does not hold them (ZeRO-3)."""
    # accelerate would import DeepSpeed to see that the model is none of its engines.
    with silence_libraries(), seemingly_absent("deepspeed"):
        model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(run.recipe.loss, PpoLoss) and isinstance(model, PeftModel):
        save_score_adapter(model, run.folder.critic, run.origin, name=CRITIC, weights=weights)
    if run.recipe.train.stage != "reward":
        save_model(model, run.tokenizer, run.folder.model, card, weights=weights)
        return
    if trainer.zero is not None and trainer.zero.is_partitioned:
        # This process alone makes the classifier, so it needs weights that nobody else has.
        with without_zero3():
            model = untrained_model(run)
    with TemporaryDirectory() as folder:
        adapter = None
        # Tokens that it trains cannot be held beside those of another adapter.
        if isinstance(model, PeftModel) and not getattr(run.recipe.tuning, "train_tokens", None):
            # Now: merging it into the classifier uses it up.
            adapter = Path(folder, ADAPTER_FOLDER)
            save_score_adapter(model, adapter, run.origin, weights=weights)
        model, weights = as_classifier(model, run.tokenizer.pad_token_id, run.dtype, weights)
        save_model(model, run.tokenizer, run.folder.model, card, weights=weights, beside=adapter)


def mixed_precision(trainer: Trainer, dtype: torch.dtype) -> torch.autocast:
    """Measure in the precision of the training: trained weights are float32, frozen ones not."""
    return torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _choose_layout(run: Run, trainer: Trainer, teaching: Teaching | None) -> None:
    """Lay micro-batches out for the model, which the trainer has brought to its device.

    Raises `ModelError` where the model would mix the examples of a packed row, or sees the tokens
    that it should predict.
    """
    model: Any = trainer.model
    packs = run.recipe.data.packing
    with mixed_precision(trainer, run.dtype):
        if trainer.device.type != "cpu" or not can_be_tried(model):
            check_causal(model)  # else it was tried where it is, when it was loaded
        if isinstance(trainer.batches, AnswerBatches) and not trainer.batches.train.rated:
            trainer.batches.shares_prompts = branches_at_a_mask(model)
        apart = _reads_alone(run, trainer) and attend_by_example(model)
        if packs and not apart:
            check_isolation(model)
        isolates = packs or apart or isolates_examples(model)
        if teaching is not None and isinstance(teaching.teacher, LiveTeacher):
            # A layout changes no result, so both get the one that both can read.
            teacher = teaching.teacher.model
            isolates = isolates and (attend_by_example(teacher) or isolates_examples(teacher))
    trainer.batches.layout = layout_for(model.config, isolates=isolates)
    if isinstance(trainer.batches, AnswerBatches):
        width = model.config.get_text_config().hidden_size
        trainer.batches.masked_layout = choose_layout("sdpa", hidden_size=width, isolates=isolates)


def _reads_alone(run: Run, trainer: Trainer) -> bool:
    """Whether the batches are laid out for this model alone, as torch runs it."""
    is_rl = isinstance(trainer.batches, RolloutBatches)
    has_reference = is_rl and not has_base_beneath(run.recipe)
    return not (run.recipe.train.torch_compile or has_reference)


def layout_for(config: Any, *, isolates: bool) -> BatchLayout:
    """The cheapest layout of micro-batches for a model of this config.

    `isolates`: whether the model keeps examples that share a row apart.
    """
    text = config.get_text_config()
    if isolates and text._attn_implementation == BY_EXAMPLE:
        return all_in_one_row
    return choose_layout(text._attn_implementation, hidden_size=text.hidden_size, isolates=isolates)
