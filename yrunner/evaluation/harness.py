"""Tasks of lm-evaluation-harness, run on a model that is already loaded.

An extra: `pip install yrunner[harness]`; imported only when a recipe asks for it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from yrunner.errors import MissingError, YRunnerError
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.results import TaskResult
from yrunner.models.errors import silence_libraries
from yrunner.recipe.schema.eval import HarnessTask
from yrunner.storage.run_dir import hash_files

PREFERRED = ("acc_norm", "exact_match", "acc", "f1")
"""The main figure of a task: the first of these that it has, else its first."""


def check_harness(task: HarnessTask) -> None:
    """Raise `MissingError` without the harness, and `YRunnerError` for a task it does not know."""
    if find_spec("lm_eval") is None:
        raise MissingError(
            f'the task "{task.name}" needs lm-evaluation-harness',
            remedy="install it: pip install 'yrunner[harness]'",
        )
    known = _manager(task.include).all_tasks
    for name in task.tasks:
        if name not in known:
            where = f" with {task.include}" if task.include else ""
            raise YRunnerError(
                f'{task.name}: lm-evaluation-harness{where} has no task "{name}"',
                remedy="list its tasks with lm_eval ls tasks; set include for your own",
            )


def run_harness(task: HarnessTask, evaluated: EvaluatedModel) -> TaskResult:
    """Run the tasks; figures are called `task/metric`, and `score` is the mean of the main ones."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with silence_libraries(), evaluated.progress(len(task.tasks)) as advance:
        model = HFLM(
            pretrained=evaluated.loaded,
            tokenizer=evaluated.tokenizer,
            batch_size=evaluated.batch_size,
        )
        report = simple_evaluate(
            model=model,
            tasks=list(task.tasks),
            task_manager=_manager(task.include),
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            apply_chat_template=task.chat_template,
            system_instruction=evaluated.system if task.chat_template else None,
            random_seed=evaluated.seed,
            numpy_random_seed=evaluated.seed,
            torch_random_seed=evaluated.seed,
            fewshot_random_seed=evaluated.seed,
            bootstrap_iters=0,
        )
        advance(len(task.tasks))
    return _as_result(task, report)


def harness_key(task: HarnessTask, evaluated: EvaluatedModel) -> dict[str, Any]:
    """What a result depends on besides the model; its data come with the names of the tasks."""
    own = sorted(file for file in task.include.rglob("*") if file.is_file()) if task.include else []
    return {
        "harness": task.model_dump(mode="json", exclude={"name", "include"}),
        "version": version("lm_eval"),
        "files": list(hash_files(own).values()),
        "seed": evaluated.seed,
        "system": evaluated.system if task.chat_template else None,
        "template": evaluated.tokenizer.chat_template if task.chat_template else None,
    }


@cache
def _manager(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include))


def _as_result(task: HarnessTask, report: Mapping[str, Any]) -> TaskResult:
    figures: dict[str, float] = {}
    scores, score_per_question = [], []
    for name, samples in report["samples"].items():
        found = _figures(report["results"][name])
        figures |= {f"{name}/{metric}": value for metric, value in found.items()}
        main = next((metric for metric in PREFERRED if metric in found), next(iter(found)))
        scores.append(found[main])
        score_per_question += [
            float(sample[main])
            for sample in _first_filter(samples)
            if isinstance(sample.get(main), int | float)
        ]
    single = len(scores) == 1
    return TaskResult(
        side=task.side,
        kind=task.kind,
        headline="score",
        figures={"score": fmean(scores), **figures},
        per_question={"score": score_per_question} if single else {},
    )


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task by name, under its first filter."""
    figures: dict[str, float] = {}
    for key, value in results.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            figures.setdefault(metric, float(value))
    return figures


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    first = samples[0].get("filter") if samples else None
    return [sample for sample in samples if sample.get("filter") == first]
