"""What is measured of a model in an experiment, and when two measurements are the same."""

import pytest
import yaml

from tests.commands.conftest import write_recipe
from tests.conftest import write_jsonl
from yrunner.commands.compare_measure import (
    measure_key,
    measure_model,
    read_questions,
    repetition,
)
from yrunner.errors import YRunnerError
from yrunner.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([1, 2, 3, 1, 2, 3], 3, 2 / 4),  # 123 231 312 123: the first occurs twice
        ([7, 7, 7, 7, 7], 3, 1.0),
        ([1, 2, 1, 2, 1, 2], 4, 2 / 3),  # 1212 2121 1212
        ([1, 2], 3, 0.0),
        ([], 3, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_occur_more_than_once(tokens, n, share):
    assert repetition(tokens, n) == pytest.approx(share)


@pytest.fixture
def recipe_path(project):
    """A recipe with two tasks of each side and a list of faults."""
    content = yaml.safe_load((project / "tuned.yaml").read_text("utf-8"))
    content["model"]["base"] = "some/model"
    content["eval"]["tasks"] = [
        {"name": "learned", "side": "domain", "data": "test.jsonl"},
        {"name": "kept", "side": "general", "data": "validation.jsonl"},
        {"name": "kept too", "side": "general", "data": "validation.jsonl"},
    ]
    lines = [
        {"row": 2, "kind": "swapped", "right": "Dane."},
        {"row": 5, "kind": "typos", "right": "Right after all."},
        {"row": 6, "kind": "typos", "right": "Never said."},
    ]
    write_jsonl(project / "faults.jsonl", lines)
    content["compare"] = {"faults": {"file": "faults.jsonl", "data": "train.jsonl"}}
    return write_recipe(project / "tuned.yaml", content)


def test_every_answer_is_scored_in_its_measure_and_group(
    recipe_path, capitals_tokenizer, monkeypatch
):
    """The model is a list of what it says, so that every score is known."""
    recipe = load_recipe(recipe_path)
    questions = read_questions(recipe)
    asked = {question.text: question.reference for _, task in questions.tasks for question in task}
    asked |= {fault.question.text: fault.question.reference for fault in questions.faults}
    texts = list(asked)
    said = asked | {
        texts[0]: "wrong",
        texts[1]: "la la la la la la",
        questions.faults[1].question.text: "Right after all.",
        questions.faults[2].question.text: "neither",
    }
    limits = []

    def answer(model, tokenizer, prompts, *, max_new_tokens, batch_size, advance):
        limits.append(max_new_tokens)
        advance(len(prompts))
        return [next(said[text] for text in said if text in prompt) for prompt in prompts]

    monkeypatch.setattr("yrunner.evaluation.tasks.generate_answers", answer)
    scores = measure_model(None, capitals_tokenizer, recipe, questions, "nobody")
    assert scores["domain"] == {"learned": [0.0, 0.0, 1.0, 1.0]}
    assert scores["general"] == {"kept": [1.0] * 4, "kept too": [1.0] * 4}
    assert scores["memorised"] == {"faults": [1.0, 0.0, 0.0]}
    assert scores["corrected"] == {"faults": [0.0, 1.0, 0.0]}
    answers = [said[question.text] for _, task in questions.tasks for question in task]
    ids = [capitals_tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    assert scores["repetition_3"] == {"answers": [repetition(tokens, 3) for tokens in ids]}
    assert scores["repetition_4"]["answers"][1] > 0
    wrong = [fault.question.reference for fault in questions.faults]
    longest = max(len(capitals_tokenizer(text)["input_ids"]) for text in wrong)
    assert limits[-1] == longest + 1, "no wrong answer is cut"


def test_an_experiment_needs_a_task_of_each_side(recipe_path):
    for side in ("domain", "general"):
        recipe = load_recipe(recipe_path, [f"eval.tasks.{n}.side={side}" for n in range(3)])
        missing = {"domain": "general", "general": "domain"}[side]
        with pytest.raises(YRunnerError, match=rf"no task of side {missing} in eval\.tasks"):
            read_questions(recipe)


def test_the_key_tells_what_changes_a_figure_from_what_does_not(recipe_path, project):
    def key(*overrides):
        return measure_key(load_recipe(recipe_path, overrides))

    first = key()
    assert first == key("train.epochs=9", "output=elsewhere", "seed=3", "eval.batch_size=1")
    others = [key("data.system=Be brief."), key("eval.tasks.0.max_new_tokens=9"), key("compare={}")]
    write_jsonl(project / "test.jsonl", [{"instruction": "new", "output": "question"}])
    others.append(key())
    assert len({first, *others}) == 5


def test_a_moved_project_keeps_its_key(recipe_path, project, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "project"
    first = measure_key(load_recipe(recipe_path))
    project.rename(moved)
    assert measure_key(load_recipe(moved / recipe_path.name)) == first
