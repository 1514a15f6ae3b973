"""Does llama.cpp answer with the exported file of a run as transformers does with its model?

    yrun merge RECIPE [key=value ...] merge.gguf=f16
    yrun eval RECIPE [key=value ...] --model outputs/NAME/merged
    python -m benchmarks.llama_answers RECIPE [key=value ...]

Asks llama.cpp (`pip install 'yrunner[llamacpp]'`) the questions of the recipe's tasks of kind
`answer`, as chats, each for its likeliest tokens. Template, tokenizer and weights are those of the
GGUF file. Prints the main figure of every model of the evaluation and of the file, and how many
answers are, to the letter, those of the last model of the evaluation.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.markdown import Cell, print_markdown
from yrunner.assembly.run import Run
from yrunner.data.chat.reply_text import answer_behind_thinking
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.questions import Question
from yrunner.evaluation.results import ModelResults
from yrunner.evaluation.scorers import headline_of, scorer_of
from yrunner.recipe.schema.eval import AnswerTask
from yrunner.storage.run_dir import read_json

COLUMNS = ("task", "model", "figure", "percent", "same answers")
CONTEXT = 0
"""Tokens of a question and its answer; 0: as many as the model has positions."""


def ask(
    file: Path,
    questions: Sequence[Question],
    system: str | None,
    max_new_tokens: int,
    *,
    apart: bool,
) -> list[str]:
    """The answers of llama.cpp; `apart`: without their thinking."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=CONTEXT, verbose=False)
    answers = []
    for question in questions:
        chat = [{"role": turn.role, "content": turn.content} for turn in question.messages]
        if system is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": system})
        found = model.create_chat_completion(
            chat, max_tokens=max_new_tokens, temperature=0.0, repeat_penalty=1.0
        )
        text = found["choices"][0]["message"]["content"]
        # As the evaluation reads them.
        answers.append((answer_behind_thinking(text) or "") if apart else text.strip())
    return answers


def rows_of(run: Run, models: Sequence[ModelResults], file: Path) -> Iterator[tuple[Cell, ...]]:
    """The rows of the table."""
    for task, questions in run.tasks:
        if not isinstance(task, AnswerTask):
            continue
        headline = headline_of(task, [question.reference for question in questions])
        for model in models:
            share = model.tasks[task.name].figures[headline]
            yield task.name, model.description, headline, f"{100 * share:.1f}", None
        apart = run.recipe.eval.thinking == "apart"
        answers = ask(file, questions, run.recipe.data.system, task.max_new_tokens, apart=apart)
        scorer = scorer_of(task)
        scores = [
            scorer(question, Generated(answer, 0, stopped=True))[headline]
            for question, answer in zip(questions, answers, strict=True)
        ]
        known = models[-1].tasks[task.name].answers
        same = sum(one == other for one, other in zip(answers, known, strict=True))
        share = sum(scores) / len(scores)
        counted = f"{same} of {len(answers)}"
        yield task.name, f"llama.cpp: {file.name}", headline, f"{100 * share:.1f}", counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    run = Run.load(given.recipe, given.overrides)
    files = sorted(run.folder.gguf.glob("*.gguf"))
    if not files or not run.folder.eval.exists():
        parser.error(f"{run.folder.folder} needs a GGUF file and an eval.json: see --help")
    models = [ModelResults.from_json(each) for each in read_json(run.folder.eval)["models"]]
    title = f"{run.recipe.name}: the same answers as {models[-1].description}, to the letter?"
    print_markdown(title, COLUMNS, list(rows_of(run, models, files[0])))


if __name__ == "__main__":
    main()
