"""What is measured of a model in an experiment, and when two measurements are the same."""

from statistics import fmean

import pytest
import yaml

from tests.conftest import write_jsonl
from tests.project import answers_of, write_recipe
from yrunner.assembly.run import Run
from yrunner.commands.compare.measure import check_questions, measure_key, measure_model
from yrunner.commands.compare.points import figures_of
from yrunner.data.text_metrics import pieces_of, repetition
from yrunner.errors import YRunnerError
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.results import ModelResults
from yrunner.recipe.load import load_recipe


@pytest.fixture
def recipe_path(project):
    """A recipe with two tasks of each side and a list of faults."""
    content = yaml.safe_load((project / "tuned.yaml").read_text("utf-8"))
    content["model"]["base"] = "some/model"
    content["eval"]["tasks"] = [
        {"name": "learned", "kind": "answer", "side": "domain", "data": "test.jsonl"},
        {"name": "kept", "kind": "answer", "side": "general", "data": "validation.jsonl"},
        {"name": "kept too", "kind": "answer", "side": "general", "data": "validation.jsonl"},
    ]
    lines = [
        {"row": 2, "kind": "swapped", "right": "Dane."},
        {"row": 5, "kind": "typos", "right": "Right after all."},
        {"row": 6, "kind": "typos", "right": "Never said."},
    ]
    write_jsonl(project / "faults.jsonl", lines)
    content["eval"]["faults"] = {"data": "train.jsonl", "list": "faults.jsonl"}
    return write_recipe(project / "tuned.yaml", content)


def test_every_task_and_fault_is_asked_and_becomes_the_figure_of_its_measure(
    recipe_path, capitals_tokenizer, monkeypatch
):
    """The model is a list of what it says, so that every figure is known."""
    run = Run.load(recipe_path)
    tasks, faults = run.tasks, run.known_faults
    asked = {question.text: question.reference for _, each in tasks for question in each}
    asked |= {fault.question.text: fault.question.reference for fault in faults}
    texts = list(asked)
    said = asked | {
        texts[0]: "wrong",
        texts[1]: "la la la la la la",
        faults[1].question.text: "right after all",
        faults[2].question.text: "neither",
    }
    seeds = set()

    def answer(model, tokenizer, prompts, *, seed, **how):
        seeds.add(seed)
        texts = (next(said[text] for text in said if text in prompt) for prompt in prompts)
        return [Generated(text, num_tokens=len(text), stopped=True) for text in texts]

    monkeypatch.setattr("yrunner.evaluation.evaluated_model.generate_answers", answer)
    monkeypatch.setattr("yrunner.commands.compare.measure.base_of", lambda *_: None)
    monkeypatch.setattr(Run, "tokenizer", capitals_tokenizer)
    results = measure_model(run, None, capitals_tokenizer, "nobody")
    assert results.tasks["learned"].per_question["exact"] == [0.0, 0.0, 1.0, 1.0]
    assert results.faults.per_row == [1.0, 0.0, 0.0]
    figures = figures_of(results)
    assert figures == {
        "domain": 0.5,
        "general": 1.0,
        "memorised": pytest.approx(1 / 3),
        "corrected": pytest.approx(1 / 3),
        "repetition_3": results.quality["repetition_3"],
        "repetition_4": results.quality["repetition_4"],
    }
    written = [said[question.text] for _, each in tasks for question in each]
    written += [said[fault.question.text] for fault in faults]
    by_hand = fmean(repetition(pieces_of(text), 3) for text in written)
    assert figures["repetition_3"] == pytest.approx(by_hand) != 0
    measure_model(Run.load(recipe_path, ["seed=9"]), None, capitals_tokenizer, "it")
    assert len(seeds) == 1, "whatever seed a run was trained with"


def test_the_mean_over_a_sides_tasks_is_its_figure_and_what_was_not_measured_has_none():
    tasks = {
        "learned": answers_of("domain", [1.0, 0.0]),
        "kept": answers_of("general", [1.0] * 98 + [0.0] * 2),
        "kept too": answers_of("general", [0.0, 0.0]),
        "style": answers_of("quality", [0.0, 1.0, 1.0, 1.0]),
    }
    figures = figures_of(ModelResults("it", tasks))
    assert figures == pytest.approx({"domain": 0.5, "general": 0.49, "quality": 0.75})


def test_an_experiment_needs_a_task_of_each_side(recipe_path):
    for side in ("domain", "general"):
        run = Run.load(recipe_path, [f"eval.tasks.{n}.side={side}" for n in range(3)])
        missing = {"domain": "general", "general": "domain"}[side]
        with pytest.raises(YRunnerError, match=rf"no task of side {missing} in eval\.tasks"):
            check_questions(run)


def test_the_key_tells_what_changes_a_figure_from_what_does_not(recipe_path, project):
    def key(*overrides):
        return measure_key(load_recipe(recipe_path, overrides))

    first = key()
    assert first == key("train.epochs=9", "output=elsewhere", "seed=3", "eval.batch_size=1")
    others = [
        key("data.system=Be brief."),
        key("eval.tasks.0.max_new_tokens=9"),
        key("eval.faults=null"),
    ]
    others.append(key("eval.generation={kind: beams}"))
    write_jsonl(project / "test.jsonl", [{"instruction": "new", "output": "question"}])
    others.append(key())
    assert len({first, *others}) == 6


def test_a_moved_project_keeps_its_key(recipe_path, project, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "project"
    first = measure_key(load_recipe(recipe_path))
    project.rename(moved)
    assert measure_key(load_recipe(moved / recipe_path.name)) == first


def test_files_that_a_task_needs_beside_its_data_belong_to_the_key(recipe_path, project):
    """A schema of JSON, and the folder of own tasks of the harness."""
    (project / "schema.json").write_text("{}")
    own = project / "own" / "deep"
    own.mkdir(parents=True)
    (own / "task.yaml").write_text("task: one")
    form = "{kind: json, json_schema: schema.json}"
    kinds = {
        project / "schema.json": f"{{kind: format, data: test.jsonl, form: {form}, %s}}",
        own / "task.yaml": "{kind: harness, tasks: [one], include: own, %s}",
    }
    for file, task in kinds.items():
        recipe = load_recipe(recipe_path, [f"eval.tasks.2={task % 'name: it, side: general'}"])
        first = measure_key(recipe)
        file.write_text('{"type": "object"}')
        assert measure_key(recipe) != first
