"""What an experiment measures of one model: its tasks, listed faults, and repetition.

The only place of `yrun compare` that lets a model answer.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from yrunner.commands.fingerprint import without_folders
from yrunner.commands.measure import answer_tasks, read_tasks
from yrunner.console import progress
from yrunner.errors import YRunnerError
from yrunner.evaluation.faults import Fault, read_faults
from yrunner.evaluation.seed_bootstrap import Scores
from yrunner.evaluation.tasks import Answered, Question, answer_questions
from yrunner.recipe.schema import AnswerTask, Recipe
from yrunner.run_dir import hash_files

NGRAMS = (3, 4)
SIDES = ("domain", "general")


@dataclass(frozen=True)
class Questions:
    """Everything that is asked of each model of an experiment."""

    tasks: list[tuple[AnswerTask, list[Question]]]
    faults: list[Fault]


def read_questions(recipe: Recipe) -> Questions:
    """The questions of the recipe's tasks and its faults; a faulty file is found before training.

    Raises `YRunnerError` for a recipe without a task of each side, and `DataError` for files.
    """
    for side in SIDES:
        if not any(task.side == side for task in recipe.eval.tasks):
            raise YRunnerError(
                f"{recipe.name} has no task of side {side} in eval.tasks",
                remedy="an experiment needs both: what is learned, and what must not be forgotten",
            )
    listed = recipe.compare.faults
    return Questions(read_tasks(recipe), read_faults(listed.file, listed.data) if listed else [])


def measure_model(
    model: Any, tokenizer: Any, recipe: Recipe, questions: Questions, who: str
) -> dict[str, Scores]:
    """The scores of a model by measure, a group for each task; `who` is for the progress bar.

    `domain` and `general`: answered exactly. `memorised`: faulty rows whose wrong answer it gives;
    `corrected`: those that it answers rightly all the same. `repetition_3`, `repetition_4`: the
    share of repeated n-grams in each answer to a task.
    """
    answers = answer_tasks(model, tokenizer, recipe, questions.tasks, who)
    sides = {task.name: task.side for task, _ in questions.tasks}
    scores: dict[str, Scores] = {
        side: {
            name: [float(answered.is_right) for answered in rows]
            for name, rows in answers.items()
            if sides[name] == side
        }
        for side in SIDES
    }
    if questions.faults:
        scores |= _fault_scores(model, tokenizer, recipe, questions.faults, who)
    texts = [answered.answer for rows in answers.values() for answered in rows]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for n in NGRAMS:
        scores[f"repetition_{n}"] = {"answers": [repetition(ids, n) for ids in tokens]}
    return scores


def repetition(tokens: Sequence[int], n: int) -> float:
    """The share of the n-grams of an answer that occur in it more than once; 0 where it has none.

    See design.md, section 5: an n-gram is counted each time that it occurs.
    """
    ngrams = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    repeated = sum(count for count in ngrams.values() if count > 1)
    return repeated / total if (total := ngrams.total()) else 0.0


def measure_key(recipe: Recipe) -> str:
    """Names what is measured: figures of two keys cannot be set against each other."""
    files: list[Path] = [task.data for task in recipe.eval.tasks]
    listed = recipe.compare.faults
    if listed is not None:
        files += [listed.file, listed.data]
    if recipe.model.chat_template is not None:
        files.append(recipe.model.chat_template)
    tasks = [task.model_dump(mode="json") for task in recipe.eval.tasks]
    what = {
        "tasks": tasks,
        "faults": listed.model_dump(mode="json") if listed else None,
        "system": recipe.data.system,
        "model": recipe.model.model_dump(mode="json"),
        "files": hash_files(files),
    }
    text = json.dumps(without_folders(what), sort_keys=True, ensure_ascii=False)
    return sha256(text.encode()).hexdigest()[:12]


def _fault_scores(
    model: Any, tokenizer: Any, recipe: Recipe, faults: Sequence[Fault], who: str
) -> dict[str, Scores]:
    # Long enough for the longest wrong answer with its end mark: a cut one would pass for unlearnt.
    wrong = [fault.question.reference for fault in faults]
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wrong)
    with progress(f"listed faults, {who}", len(faults)) as advance:
        answered = answer_questions(
            model,
            tokenizer,
            [fault.question for fault in faults],
            system=recipe.data.system,
            max_new_tokens=longest + 1,
            batch_size=recipe.eval.batch_size,
            advance=advance,
        )
    pairs = list(zip(answered, faults, strict=True))
    corrected = [Answered(row.question, fault.right, row.answer).is_right for row, fault in pairs]
    return {
        "memorised": {"faults": [float(row.is_right) for row in answered]},
        "corrected": {"faults": list(map(float, corrected))},
    }
