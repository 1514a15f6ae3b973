"""What a recipe holds a model to: the rows that its base wrote or that a file brings, tokenized."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from yrunner.commands.base import base_source
from yrunner.commands.data_files import keep_sources, recipe_rules
from yrunner.commands.model_key import model_key
from yrunner.commands.replay_rows import Wanted, replay_folder, written_rows
from yrunner.commands.train_model import untrained_model
from yrunner.console import progress, say
from yrunner.data.cache import Cache
from yrunner.data.conversation import TokenizedExample
from yrunner.data.pipeline import Rules, Source, prepare
from yrunner.data.refusals import num_rows
from yrunner.errors import DataError
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_keep import Ewc, HeldToRows, KeepRows, SelfReplay, Writing
from yrunner.replay_dir import ReplayDir
from yrunner.run_dir import RunDir
from yrunner.scoring.base_answers import KeptTops, keep_tops
from yrunner.scoring.score_file import row_hashes
from yrunner.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class KeptData:
    """What a run is held to and measured on; nothing where the recipe keeps nothing."""

    folder: ReplayDir | None = None
    rows: list[TokenizedExample] = field(default_factory=list)
    """To be held to."""
    held_out: list[TokenizedExample] = field(default_factory=list)
    """For the gauge."""
    row_tops: KeptTops | None = None
    """What the base predicts for the rows, where it is not beneath an adapter."""
    held_out_tops: KeptTops | None = None


def writing_of(recipe: Recipe) -> Writing:
    """How the recipe's base writes its rows."""
    return recipe.keep if isinstance(recipe.keep, Writing) else Writing()


def wanted_rows(recipe: Recipe) -> Wanted:
    """What the recipe asks its base to write."""
    if recipe.model.scratch is not None:
        return Wanted()
    keep, data = recipe.keep, recipe.data
    rows = 0
    if isinstance(keep, SelfReplay) or (isinstance(keep, Ewc) and keep.file is None):
        rows = keep.rows
    validates = bool(data.validation) or data.validation_share is not None
    return Wanted(rows, recipe.drift.rows if validates else 0)


def has_base_beneath(recipe: Recipe) -> bool:
    """Whether the trained model with its adapter off is the model as it was before training."""
    tuning = recipe.tuning
    return tuning.kind not in ("full", "freeze") and getattr(tuning, "adapter", None) is None


def check_keep_file(recipe: Recipe, tokenizer: Any) -> None:
    """Raise what is wrong with the recipe's file of kept rows, before anything is loaded."""
    for source in keep_sources(recipe):
        _examples(recipe, tokenizer, source, recipe_rules(recipe))


def prepare_keep(recipe: Recipe, tokenizer: Any, dtype: torch.dtype) -> KeptData:
    """The rows that a run is held to, written now where they are missing.

    Comes before TrainingArguments: under DeepSpeed ZeRO-3 those decide how weights load, and here
    the base is needed whole. Raises `YRunnerError` for rows that are of no use.
    """
    wanted = wanted_rows(recipe)
    sources = keep_sources(recipe)
    if not (wanted.rows or wanted.held_out or sources):
        return KeptData()
    folder = replay_folder(recipe, writing_of(recipe))
    rows: list[TokenizedExample] = []
    held_out: list[TokenizedExample] = []
    if wanted.rows or wanted.held_out:
        written = written_rows(recipe, writing_of(recipe), wanted)
        folder = written.folder
        if wanted.rows:
            rows = _tokenized(recipe, tokenizer, folder.rows)[: wanted.rows]
        if written.held_out:
            held_out = _tokenized(recipe, tokenizer, folder.held_out)[: wanted.held_out]
    for source in sources:
        rows = _examples(recipe, tokenizer, source, recipe_rules(recipe))
    if isinstance(recipe.keep, HeldToRows):
        say(f"held to {num_rows(len(rows))}, {recipe.keep.share:.0%} of each update")
    return _with_tops(recipe, tokenizer, dtype, KeptData(folder, rows, held_out))


def rows_key(recipe: Recipe, rows: Sequence[TokenizedExample], *what: Any) -> str:
    """Changes with the rows, with the model as it is before training, and with `what`."""
    tuning = recipe.tuning.model_dump(mode="json")
    facts = [model_key(base_source(recipe)), tuning.get("adapter"), row_hashes(rows), *what]
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _with_tops(recipe: Recipe, tokenizer: Any, dtype: torch.dtype, kept: KeptData) -> KeptData:
    if has_base_beneath(recipe) or kept.folder is None:
        return kept
    keep = recipe.keep
    by_kl = isinstance(keep, SelfReplay | KeepRows) and keep.by == "kl"
    tops = [
        _tops(recipe, tokenizer, dtype, kept.folder, rows, top) if rows and top else None
        for rows, top in (
            (kept.rows, keep.top if by_kl and isinstance(keep, SelfReplay | KeepRows) else 0),
            (kept.held_out, recipe.drift.top),
        )
    ]
    return KeptData(kept.folder, kept.rows, kept.held_out, *tops)


def _tops(
    recipe: Recipe,
    tokenizer: Any,
    dtype: torch.dtype,
    folder: ReplayDir,
    rows: Sequence[TokenizedExample],
    top: int,
) -> KeptTops:
    """What the model predicts for rows before it is trained: computed once, then read from disk."""
    path = folder.tops(rows_key(recipe, rows, top, str(dtype)))
    folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        if not path.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = untrained_model(recipe, tokenizer, dtype).to(device)
            autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
            with autocast, progress("what the base predicts, rows", len(rows)) as advance:
                tops = keep_tops(
                    model,
                    rows,
                    top=top,
                    pad_token_id=tokenizer.pad_token_id,
                    max_tokens=recipe.train.batch_size * recipe.data.max_length,
                    advance=advance,
                )
            partial = path.with_suffix(".partial")
            tops.save(partial)
            partial.rename(path)
        tops = KeptTops.load(path)
    say(
        f"the base's {top:,} likeliest tokens for {num_rows(len(rows))}; all others together have "
        f"{tops.mean_rest:.2%} of its probability"
    )
    return tops


def _tokenized(recipe: Recipe, tokenizer: Any, file: Path) -> list[TokenizedExample]:
    """Rows that the base wrote; learned is what it wrote, not the opening that it was given."""
    rules = Rules(
        max_length=recipe.data.max_length,
        too_long="drop",
        invalid="drop",
        system=recipe.data.system,
        targets="all",
    )
    return without_opening(_examples(recipe, tokenizer, Source((file,)), rules))


def _examples(
    recipe: Recipe, tokenizer: Any, source: Source, rules: Rules
) -> list[TokenizedExample]:
    cache = Cache(RunDir(recipe.run_folder).prepared)
    prepared = prepare([source], tokenizer, rules, cache, seed=recipe.seed)
    left_out = sum(len(report.refusals) for report in prepared.reports)
    if left_out and rules.too_long == "drop":
        say(f"{source.files[0].name}: {num_rows(left_out)} left out, longer than data.max_length")
    else:
        prepared.check(too_long=rules.too_long, invalid=rules.invalid)
    examples = list(prepared.train)
    if not examples:
        raise DataError(source.files[0], "no row is left to hold", remedy="raise data.max_length")
    return examples


def without_opening(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The examples without what all of them begin with, which was given, as a target."""
    if len(examples) < 2:
        return list(examples)
    # What the first and the last in order have in common, all have.
    first, last = (pick(example.input_ids for example in examples) for pick in (min, max))
    same = (left == right for left, right in zip(first, last, strict=False))
    given = sum(takewhile(bool, same))
    return [
        TokenizedExample(
            example.input_ids,
            [IGNORE_INDEX] * given + example.labels[given:],
            example.origin,
        )
        for example in examples
    ]
