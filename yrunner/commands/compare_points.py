"""`yrun measure`: the tasks of a recipe, answered by every checkpoint of its run, or by its base.

`yrun compare` runs this in a process of its own, behind the training of each arm. What was
measured is kept after each checkpoint, so that work that was interrupted goes on there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yrunner.belongings import remove
from yrunner.commands.compare_measure import (
    figures_of,
    measure_key,
    measure_model,
    read_questions,
)
from yrunner.commands.compare_plan import due_checkpoints
from yrunner.commands.finished import base_model, checkpoint_model, finished_run, tuned_tokenizer
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.console import say
from yrunner.evaluation.results import ModelResults
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import read_json, write_text


@dataclass(frozen=True)
class Point:
    """One model of a run: after how many updates, and what it reached."""

    step: int
    results: ModelResults

    @property
    def figures(self) -> dict[str, float]:
        """By measure, see `figures_of`."""
        return figures_of(self.results)


@dataclass(frozen=True)
class Measurement:
    """The points of a run, in the order of their steps."""

    key: str
    """What was measured, see `measure_key`."""
    points: tuple[Point, ...] = ()
    is_complete: bool = False

    @property
    def steps(self) -> list[int]:
        """The updates after which there is a point."""
        return [point.step for point in self.points]

    def save(self, path: Path) -> None:
        """Write it as JSON, without line breaks: it holds an answer for each question."""
        points = [{"step": point.step, "results": point.results.to_json()} for point in self.points]
        content = {"key": self.key, "complete": self.is_complete, "points": points}
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Measurement | None":
        """Read what `save` wrote; None where nothing was."""
        if not path.exists():
            return None
        content = read_json(path)
        points = tuple(
            Point(point["step"], ModelResults.from_json(point["results"]))
            for point in content["points"]
        )
        return cls(content["key"], points, content["complete"])


def measure(path: Path, overrides: Sequence[str], *, base: Path | None) -> None:
    """Measure every checkpoint of a finished run, or, into the file `base`, its base."""
    recipe = load_recipe(path, overrides)
    if base is None:
        measure_run(recipe)
    else:
        measure_base(recipe, base)


def measure_run(recipe: Recipe) -> None:
    """Measure the checkpoints that were due and not measured yet; then remove those that may go."""
    run_dir = finished_run(recipe)
    tasks, tokenizer = read_questions(recipe), tuned_tokenizer(run_dir)
    key = measure_key(recipe)
    found = Measurement.load(run_dir.measured)
    measurement = found if found is not None and found.key == key else Measurement(key)
    steps = run_dir.saved_steps()
    for step in due_checkpoints(recipe, steps):
        if step in measurement.steps:
            continue
        model = checkpoint_model(recipe, run_dir, step)
        results = measure_model(recipe, tasks, model, tokenizer, f"update {step:,}")
        measurement = replace(measurement, points=(*measurement.points, Point(step, results)))
        measurement.save(run_dir.measured)
        say(_line(measurement.points[-1]))
    if recipe.compare.checkpoints == "last":
        for step in steps[:-1]:
            remove(run_dir.checkpoint(step))
    replace(measurement, is_complete=True).save(run_dir.measured)


def measure_base(recipe: Recipe, file: Path) -> None:
    """Measure the model that the recipe starts from, as a run whose only point is at update 0."""
    tasks, tokenizer = read_questions(recipe), recipe_tokenizer(recipe)
    point = Point(0, measure_model(recipe, tasks, base_model(recipe), tokenizer, "the base"))
    Measurement(measure_key(recipe), (point,), is_complete=True).save(file)
    say(_line(point))


def _line(point: Point) -> str:
    figures = (f"{measure} {figure:.1%}" for measure, figure in point.figures.items())
    return f"update {point.step:,}: {', '.join(figures)}"
