"""`yrun inspect --html`: a page with every token's loss before and after training."""

import gc
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from yrunner.assembly.identity import changes_since
from yrunner.assembly.measure import score_rows
from yrunner.assembly.run import Run
from yrunner.commands.inspect.command import ShownExample, first_rows, mark_of, one_row
from yrunner.commands.inspect.rollouts import inspect_rollouts
from yrunner.console import say
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import RunError, YRunnerError
from yrunner.models.load import check_vocabulary
from yrunner.reports.heat_map import AFTER, BEFORE, HeatMap, ScoredExample, write_heat_map
from yrunner.scoring.measure import TokenScores
from yrunner.storage.run_dir import page_beside
from yrunner.training.arguments import token_weight


def inspect_html(
    path: Path, overrides: list[str], *, number: int, row: str | None, page: Path | None
) -> None:
    """Write the rows that `inspect` prints as a token heat map; of rl, the answers of the run.

    `page` is the file; None puts it beside the run folder. Raises `YRunnerError` if it is not an
    .html file, or if the base, or the result of a new model, is not trained yet.
    """
    run = Run.load(path, overrides)
    recipe = run.recipe
    page = page_beside(recipe.run_folder, "tokens", page)
    if recipe.train.stage == "rl":
        return inspect_rollouts(run, number=number, row=row, page=page)
    has_result = _has_result(run)
    if has_result:
        _check_tokenizer(run)
    shown, left_out = _examples(run, number, row)
    examples = [it.example for it in shown]
    models = _models(run)
    scores = {when: _score(run, load, examples, when) for when, (_, load) in models.items()}
    heat_map = HeatMap(
        title=recipe.name,
        models={when: name for when, (name, _) in models.items()},
        weighting=recipe.loss.kind,
        loss_deadline=token_weight(recipe.token_loss)[1],
        examples=[
            ScoredExample(
                it.example,
                {when: of[place] for when, of in scores.items()},
                left_out,
                mark_of(run, it),
            )
            for place, it in enumerate(shown)
        ],
        other_settings=_other_settings(run) if has_result else [],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_heat_map(heat_map, run.tokenizer, page)
    say(f"tokens: {page}")


def _has_result(run: Run) -> bool:
    """Whether the run is finished. Raises `RunError` if a model must be trained first."""
    recipe, base = run.recipe, run.base
    if recipe.model.scratch is not None:
        # The losses of random weights mean nothing.
        run.require_result()
    if base is not None and run.stale_base is not None:
        raise RunError(
            f"{base.recipe.name}, the base of {recipe.name}, is not trained or has changed",
            remedy=f"train it first: yrun train {base.options.arguments}",
        )
    return run.folder.is_finished()


def _check_tokenizer(run: Run) -> None:
    if run.result_tokenizer.get_vocab() != run.tokenizer.get_vocab():
        raise RunError(
            f"the tokenizer of the result in {run.folder.folder} differs from that of the recipe",
            remedy="train it again: yrun train ... --overwrite",
        )


def _examples(run: Run, number: int, row: str | None) -> tuple[list[ShownExample], str]:
    """The examples to show, and why they are left out, if they are."""
    if row is None:
        rows = first_rows(run, number)
        return [it for examples in rows for it in examples], ""
    found = one_row(run, row)
    left_out = found.left_out.reason if found.left_out else ""
    examples = [it for it in found.examples if it.example.target_positions]
    if not examples:
        raise YRunnerError(
            f"{row} has no targets to colour ({left_out})",
            remedy="print the row with yrun inspect without --html",
        )
    return examples, left_out


def _models(run: Run) -> dict[str, tuple[str, Callable[[], PreTrainedModel]]]:
    """Name and loader of the base and of the result, if they exist."""
    models: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {}
    if run.recipe.model.scratch is None:
        name = str(run.recipe.model.base) if run.base is None else run.base.recipe.name
        models[BEFORE] = (name, run.load_base)
    if run.folder.is_finished():
        models[AFTER] = (str(run.folder.folder), run.load_result)
    return models


def _score(
    run: Run, load: Callable[[], PreTrainedModel], examples: list[TokenizedExample], when: str
) -> list[TokenScores]:
    # A model with a fused head refers to itself; free it before loading the next.
    gc.collect()
    model = load()
    check_vocabulary(model, run.tokenizer)
    return score_rows(run, model, examples, f"scoring, {when} training")


def _other_settings(run: Run) -> list[str]:
    return changes_since(run.folder, run.recipe) if run.folder.fingerprint.exists() else []
