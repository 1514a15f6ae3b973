"""The base of a recipe looks at its rows: every target's loss and entropy, kept as they come."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from yrunner.commands.base import base_source
from yrunner.commands.finished import base_model
from yrunner.commands.model_key import model_key
from yrunner.commands.sort_processes import Share, measure_together, num_processes
from yrunner.console import progress, say
from yrunner.data.store import Examples
from yrunner.models.adapters import attach_adapter
from yrunner.models.load import check_vocabulary, choose_dtype
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_model import AdapterTuning
from yrunner.scoring.measure import TokenScores, score_by_length
from yrunner.scoring.score_file import ScoreFile, row_hashes
from yrunner.training.arguments import token_weight


def measure_rows(
    recipe: Recipe, tokenizer: Any, examples: Examples, folder: Path
) -> Sequence[TokenScores]:
    """The scores of every example by the model that training starts from, in their order.

    Those that `folder` holds already are not measured again. Raises `ModelError` where the base
    cannot be loaded.
    """
    lengths = examples.lengths.tolist()
    with ScoreFile.open(folder, _key(recipe), row_hashes(examples)) as file:
        if file.done:
            say(f"measured before: {len(file.done):,} of {len(examples):,} examples")
        if len(file.done) < len(examples):
            # In tokens, because rows differ in length, and the longest come first.
            with progress("scoring rows with the base, tokens", sum(lengths)) as advance:
                advance(sum(lengths[index] for index in file.done))
                processes = num_processes(recipe)
                if processes == 1:
                    measure_share(recipe, tokenizer, examples, folder, (0, 1), advance)
                else:
                    measure_together(recipe, folder, processes, measure_share, advance)
        return file.read(examples.origin)


def measure_share(
    recipe: Recipe,
    tokenizer: Any,
    examples: Examples,
    folder: Path,
    share: Share,
    advance: Callable[[int], None],
) -> None:
    """Measure what one of several processes has to, and say of each row how many tokens it has."""
    with ScoreFile.open(folder, _key(recipe), row_hashes(examples), rank=share[0]) as file:
        scores = score_by_length(
            _load_base(recipe, tokenizer),
            examples,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=_max_tokens(recipe),
            weight=token_weight(recipe.loss)[0],
            done=file.done,
            shard=share,
            wants_context=recipe.sort.asks_neighbours,
        )
        for index, scored in scores:
            file.append(index, scored)
            advance(len(examples[index].input_ids))


def _load_base(recipe: Recipe, tokenizer: Any) -> Any:
    model = base_model(recipe)
    check_vocabulary(model, tokenizer)
    adapter = _adapter(recipe)
    if adapter is None:
        return model
    return attach_adapter(model, adapter, trainable=False).to(model.device)


def _adapter(recipe: Recipe) -> Path | None:
    """The adapter that training would go on with."""
    tuning = recipe.tuning
    if isinstance(tuning, AdapterTuning) and tuning.adapter is not None:
        return Path(tuning.adapter)
    return None


def _max_tokens(recipe: Recipe) -> int:
    """Tokens that are computed at once: no more than training may meet in a micro-batch."""
    return recipe.train.batch_size * recipe.data.max_length


def _key(recipe: Recipe) -> str:
    """Everything that a row's scores depend on besides its tokens, down to the last digit."""
    adapter = _adapter(recipe)
    facts = {
        "base": model_key(base_source(recipe)),
        "adapter": None if adapter is None else model_key(adapter),
        "dtype": str(choose_dtype(recipe.model.dtype)),
        "attention": recipe.model.attention,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "max_tokens": _max_tokens(recipe),
        "context": recipe.sort.asks_neighbours,
        "loss": recipe.loss.model_dump(mode="json"),
    }
    return json.dumps(facts, sort_keys=True)
