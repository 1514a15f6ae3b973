"""`yrun eval`: the tasks of a recipe, answered by its base and by its result."""

from pathlib import Path

from yrunner.commands.finished import base_model, finished_run, tuned_model, tuned_tokenizer
from yrunner.commands.measure import Measured, answer_tasks, read_tasks
from yrunner.commands.train_story import print_tasks
from yrunner.console import say
from yrunner.errors import YRunnerError
from yrunner.recipe.load import load_recipe


def evaluate(path: Path, overrides: list[str]) -> None:
    """Answer every task with both models, print the shares, and write them to `eval.json`."""
    recipe = load_recipe(path, overrides)
    if not recipe.eval.tasks:
        raise YRunnerError(f"{path} has no eval.tasks", remedy="add one, with name, side and data")
    tasks = read_tasks(recipe)
    run_dir = finished_run(recipe)
    tokenizer = tuned_tokenizer(run_dir)
    before = None
    if recipe.model.base is not None:
        before = Measured(answer_tasks(base_model(recipe), tokenizer, recipe, tasks, "the base"))
    tuned = tuned_model(recipe, run_dir)
    after = Measured(answer_tasks(tuned, tokenizer, recipe, tasks, "the result"))
    after.save(run_dir.eval)
    print_tasks(recipe, before, after)
    say(f"answers: {run_dir.eval}")
