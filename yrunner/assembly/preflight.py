"""What a run needs before it starts: packages, sorted rows, row lengths, disk space."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from yrunner.assembly.rl.vllm import require_vllm
from yrunner.assembly.run import Run
from yrunner.console import as_gigabytes, counted, say
from yrunner.data.batching.plan import Plan
from yrunner.data.chat.reply_text import closes_thinking
from yrunner.data.chat.template import read_turn_marks
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import ModelError, RunError, YRunnerError
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import about_the_teacher
from yrunner.models.gguf.needs import check_gguf, fallback_in_words
from yrunner.models.limits import check_lengths, require_flash_attention, unlearned_rows
from yrunner.models.load import check_folder, check_ids, check_same_tokens, find_stop_ids
from yrunner.models.quantization import require_bitsandbytes
from yrunner.models.reward import check_classifier
from yrunner.models.size import DiskNeed, estimate_disk
from yrunner.models.templates.choose import split_marks
from yrunner.models.tuning import check_base_is_saved
from yrunner.recipe.schema.model import AdapterTuning, FreezeTuning, QloraTuning
from yrunner.recipe.schema.preference import SMALL_BETA, DpoLoss
from yrunner.recipe.schema.recipe import Recipe
from yrunner.rewards.make import check_trust
from yrunner.storage.run_dir import SortDir, free_bytes
from yrunner.storage.run_lock import run_lock
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import OF_BITSANDBYTES
from yrunner.training.callbacks import count_checkpoints
from yrunner.training.compile import check_compiler
from yrunner.training.memory.trace import optimizer_bytes
from yrunner.training.trackers import check_trackers

LOOKED_AT = 100
"""Examples whose marks are looked for."""


def check_needs(run: Run) -> None:
    """Raise `MissingError` for a missing package, compiler or GPU."""
    recipe = run.recipe
    check_trackers(recipe.train.trackers)
    run.check_precision()
    check_trust(recipe.rewards, trust_code=run.options.trust_code)
    if recipe.model.attention == "flash_attention_2":
        require_flash_attention()
    if recipe.rollout.engine == "vllm":
        require_vllm()
    if recipe.train.torch_compile:
        check_compiler()
    if recipe.train.optimizer in OF_BITSANDBYTES:
        require_bitsandbytes(f"train.optimizer {recipe.train.optimizer}")
    if recipe.train.stage == "reward" and run.stored_quantization is not None:
        raise ModelError(
            f"the base {recipe.model.base} is stored quantized ({run.stored_quantization}), but a "
            "reward model is saved with its adapter merged",
            remedy="use the unquantized model",
        )
    if isinstance(recipe.tuning, QloraTuning):
        require_bitsandbytes("tuning.kind qlora")
    if recipe.teacher is not None and recipe.teacher.quantize != "none":
        require_bitsandbytes(f"teacher.quantize {recipe.teacher.quantize}")


Sorter = Callable[[Run], object]
"""Sorts the training rows of a run."""


def sort_rows(run: Run, sort: Sorter | None) -> None:
    """Sort the rows that a run learns from, if that is missing or has changed; say the result.

    Without `sort`, rows that are not sorted are an error. A run that is resumed keeps the rows that
    it began with, unless they are gone.
    """
    for sorting in run.sorts:
        why, done = sorting.stale_sort(), SortDir.finished(sorting.folder.sort)
        if why is not None and done is not None and run.options.resume:
            say(f"{why.partition(':')[0]}; the resumed run keeps the rows that it began with")
        elif why is not None:
            if sort is None:
                raise RunError(why, remedy=f"run yrun sort {sorting.options.arguments}")
            say(why)
            is_locked = sorting.folder.folder == run.folder.folder
            with nullcontext() if is_locked else run_lock(sorting.folder.folder):
                sort(sorting)
            sorting.forget_rows()
            run.forget_rows()
        say_sorted_rows(run, sorting)


def say_sorted_rows(run: Run, sorting: Run) -> None:
    """Print what a finished sort kept and dropped, and in which order its rows are learned."""
    done = SortDir.finished(sorting.folder.sort)
    assert done is not None, "the rows were sorted before"
    kept, dropped = done.count_rows()
    keeps_order = run.recipe.train.order == "as_written"
    order = "in this order" if keeps_order else "shuffled; train.order: as_written keeps the order"
    say(
        f"{sorting.recipe.name}: {num_rows(kept)} kept, {dropped:,} dropped "
        f"({done.report}), {order}"
    )


def check_fit(run: Run) -> None:
    """Check that the model can read every row, before its weights are loaded.

    Raises `DataError` if the longest row has more tokens than the model has positions, and
    `ModelError` if the tokenizer has ids without an embedding, no reward model can be made, or the
    teacher does not fit.
    """
    config, prepared = run.config, run.dataset
    if run.recipe.train.stage == "reward":
        check_classifier(config)
    if isinstance(run.recipe.tuning, AdapterTuning) and run.recipe.model.scratch is None:
        check_base_is_saved(run.base_source)
    check_ids(run.tokenizer, config.get_text_config().vocab_size)
    for rows in (prepared.train, prepared.validation):
        examples = rows.examples
        answer = run.rules.answer_length
        check_lengths(examples.lengths + answer, examples.origin, config)
    if recipe_teacher := run.recipe.teacher:
        _check_teacher(run, recipe_teacher.model)


def _check_teacher(run: Run, name: str) -> None:
    """Its tokenizer must be that of the model, and its positions enough for every row."""
    with about_the_teacher():
        config, tokenizer = run.teacher_config, run.teacher_tokenizer
        check_ids(tokenizer, config.get_text_config().vocab_size)
        if run.untrained_teacher is None:
            adapter = find_adapter(run.teacher_source)
            check_folder(Path(run.teacher_source if adapter is None else read_base(adapter)))
    check_same_tokens(run.tokenizer, tokenizer, name)
    with about_the_teacher():
        for rows in (run.dataset.train, run.dataset.validation):
            check_lengths(rows.examples.lengths, rows.examples.origin, config)


def findings_of_recipe(recipe: Recipe) -> list[str]:
    """Sentences on settings that are allowed, but hardly ever meant."""
    loss = recipe.loss
    if isinstance(loss, DpoLoss) and loss.length == "mean" and loss.beta < SMALL_BETA:
        return [
            f"loss.beta {loss.beta:g} is small for loss.length: mean, whose margins are nats per "
            "token: nothing holds the model to its reference. Set loss.beta to about 1 to 10"
        ]
    dropout, passes = getattr(recipe.tuning, "dropout", 0.0), recipe.rollout.updates_per_rollout
    if recipe.train.stage == "rl" and dropout and passes > 1:
        return [
            f"tuning.dropout {dropout:g} moves the probability ratios of the {passes:,} updates "
            "that learn from the same answers, and some are clipped for nothing. Set "
            "tuning.dropout to 0"
        ]
    return []


def findings_of_export(run: Run) -> list[str]:
    """What `yrun merge` would say of `merge.gguf` only after the training."""
    kind = run.recipe.merge.gguf
    if kind is None:
        return []
    try:
        check_gguf(kind, run.recipe.train.stage, run.config, run.tokenizer)
    except YRunnerError as error:
        return [f"yrun merge will refuse this recipe: {error}"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(run.config)
    weights = dict(model.named_parameters())  # tied ones once
    fallback = fallback_in_words(kind, weights)
    return [fallback] if fallback else []


def findings_of_base(run: Run, model: Any) -> list[str]:
    """Sentences on marks that the base has never learned and this run does not train.

    `model`: loaded and ready to train. Looks at special and added tokens of the first examples, and
    at those that end an answer.
    """
    tokenizer = run.tokenizer
    marks = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    examples = run.dataset.train.examples[:LOOKED_AT]
    read = {token_id for example in examples for token_id in example.input_ids} & marks
    written = {label for example in examples for label in example.labels} & marks
    written |= set(find_stop_ids(tokenizer)) & read
    rows = unlearned_rows(model, sorted(read), sorted(written))
    by_token: dict[int, list[str]] = {}
    for row in rows:
        by_token.setdefault(row.token_id, []).append(str(row))
    names = [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in by_token]
    split = split_marks(tokenizer, run.recipe.model.chat_template)
    findings = _findings_of_thinking(run)
    if split:
        findings.append(
            f"the base's tokenizer splits {', '.join(split)} of model.chat_template "
            f"{run.recipe.model.chat_template} into pieces of text"
        )
    if not names:
        return findings
    what = "; ".join(
        f"{name} (id {token_id}): {' and '.join(reasons)}"
        for name, (token_id, reasons) in zip(names, by_token.items(), strict=True)
    )
    return [
        *findings,
        f"the base has never learned some marks of these conversations, and tuning.kind "
        f"{run.recipe.tuning.kind} does not train them: {what}. {_how_to_train(run.recipe, names)}",
    ]


def _findings_of_thinking(run: Run) -> list[str]:
    """A sentence if replies think, but behind a prompt that closes the thinking."""
    tokenizer = run.tokenizer
    if not tokenizer.chat_template or run.recipe.train.stage in ("pretrain", "cpt"):
        return []
    if not closes_thinking(read_turn_marks(tokenizer).openings.get("user", "")):
        return []
    examples = run.dataset.train.examples[:LOOKED_AT]
    targets = [[token for token in it.labels if token != IGNORE_INDEX] for it in examples]
    thinking = sum(closes_thinking(tokenizer.decode(ids)) for ids in targets)
    if not thinking:
        return []
    return [
        f"{thinking:,} of the first {num_rows(len(targets))} have thinking, but a prompt ends with "
        "an empty thinking block, so the model is never asked for it. Set model.template_args to "
        "{enable_thinking: true}, or remove the thinking from the rows"
    ]


def _how_to_train(recipe: Recipe, tokens: list[str]) -> str:
    tuning = recipe.tuning
    if isinstance(tuning, FreezeTuning):
        return "Set tuning.embeddings to true"
    if isinstance(tuning, AdapterTuning) and tuning.adapter is not None:
        return "Train a new adapter, with tuning.train_tokens, or use a base that has learned them"
    return f"Set tuning.train_tokens to {json.dumps(tokens, ensure_ascii=False)}"


@dataclass(frozen=True)
class DiskFacts:
    """Disk space that a run needs, in bytes."""

    checkpoint: int
    num_checkpoints: int
    """At the peak."""
    model: int
    needed: int
    """At the peak."""
    free: int
    """Includes files of an earlier run in the folder, which are replaced step by step."""


def disk_facts(run: Run, need: DiskNeed, plan: Plan) -> DiskFacts:
    """What a run needs, and what is free in its folder."""
    recipe, run_dir = run.recipe, run.folder
    section = recipe.train.checkpoint
    # The best one by validation is kept too, and a new one is written before an old one is removed.
    written = count_checkpoints(plan.num_updates, section.every, plan.epoch_ends)
    number = min(section.keep + recipe.data.validates + 1, written)
    free = free_bytes(run_dir.folder) + _used(run_dir.checkpoints) + _used(run_dir.model)
    needed = number * need.checkpoint + need.model
    return DiskFacts(need.checkpoint, number, need.model, needed, free)


def lack_of_space(run: Run, facts: DiskFacts) -> RunError | None:
    """Why the run would fill the disk; None if it fits."""
    if facts.needed <= facts.free:
        return None
    return RunError(
        f"{run.folder.folder} has {as_gigabytes(facts.free)} free, but the run "
        f"needs {as_gigabytes(facts.needed)}: up to "
        f"{counted(facts.num_checkpoints, 'checkpoint')} of {as_gigabytes(facts.checkpoint)}, "
        f"and the model of {as_gigabytes(facts.model)}",
        remedy="free some space, keep fewer checkpoints (train.checkpoint.keep), or write to "
        "another disk with output=/another/folder",
    )


def check_disk(run: Run, model: Any, plan: Plan) -> None:
    """Raise `RunError` if training this model would fill the disk."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    need = estimate_disk(model, optimizer_bytes(run.recipe.train.optimizer, trained), run.tokenizer)
    if lack := lack_of_space(run, disk_facts(run, need, plan)):
        raise lack


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
