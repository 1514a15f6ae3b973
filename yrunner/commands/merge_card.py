"""The card of a merged model: where it comes from, and what its run and evaluation measured."""

from typing import Any

from yrunner.commands.base import base_source
from yrunner.commands.eval import BASE, TUNED
from yrunner.commands.eval_story import figure_lines, summary_lines
from yrunner.commands.measure import Measured
from yrunner.commands.train_story import model_card
from yrunner.evaluation.results import ModelResults
from yrunner.models.at_hand import local_folder
from yrunner.models.export import ModelCard
from yrunner.models.license import read_license
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, read_json


def merged_card(recipe: Recipe, run_dir: RunDir, base_key: str | None) -> ModelCard:
    """The card without the figures of a proof.

    What `yrun eval` measured stands in it where it was run, else the answers of the training.
    """
    before, after = Measured.load(run_dir.before), Measured.load(run_dir.after)
    figures = _evaluated(read_json(run_dir.eval)) if run_dir.eval.exists() else []
    card = model_card(
        recipe,
        run_dir,
        before,
        Measured({}) if figures else after,
        base_key=base_key,
        data_hashes=read_json(run_dir.fingerprint)["files"],
        license=_license(recipe),
    )
    card.figures.extend(figures)
    return card


def _license(recipe: Recipe) -> str | None:
    if recipe.model.base is None:
        return None
    folder = local_folder(base_source(recipe))
    return None if folder is None else read_license(folder)


def _evaluated(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The main figure of each task and the summaries, of the result and of the base beside it."""
    read = [ModelResults.from_json(model) for model in content["models"]]
    models = {model.description: model for model in read}
    if TUNED not in models:
        return []
    shown = [models[name] for name in (BASE, TUNED) if name in models]
    headlines = {(name, task.headline) for name, task in models[TUNED].tasks.items()}
    lines = [line for line in figure_lines(shown) if line[:2] in headlines]
    figures = []
    for group, figure, reached in [*lines, *summary_lines(shown)]:
        *before, now = ("–" if part is None else part[0] for part in reached)
        beside = f" (base: {before[0]})" if before else ""
        figures.append((f"{group}: {figure}", f"{now}{beside}"))
    return figures
