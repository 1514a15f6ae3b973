"""`yrun eval`: several models side by side, and what it refuses before any is loaded."""

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from benchmarks.processes import start_ranks
from tests.conftest import questions, write_jsonl
from tests.rounding import rounding
from yrunner.assembly.measure import evaluate, kept_results, losses_of_rows
from yrunner.assembly.run import Run
from yrunner.cli import app
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.train import train
from yrunner.errors import RecipeError, RunError, YRunnerError
from yrunner.evaluation.results import ModelResults, differences, side_score
from yrunner.storage.run_dir import RunDir

TUNED = Path("tuned.yaml")
LABELS = ["Belo", "Dane"]


@pytest.fixture
def tasks(project, change):
    """The recipe with a task of every kind but the harness."""
    rows = [{"question": question, "answer": answer} for question, answer in questions(4)]
    write_jsonl(project / "answers.jsonl", rows)
    write_jsonl(project / "prompts.jsonl", [{"prompt": row["question"]} for row in rows])
    labelled = [{"question": f"Which, {n}?", "answer": LABELS[n % 2]} for n in range(4)]
    write_jsonl(project / "labels.jsonl", labelled)
    chosen = [{"question": "Which?", "choices": LABELS, "answer": 1}]
    write_jsonl(project / "choices.jsonl", chosen)
    write_jsonl(project / "faults.jsonl", [{"row": 2, "kind": "cut"}, {"row": 3}])
    general = {"side": "general", "max_new_tokens": 4}
    change(
        "tuned.yaml",
        eval__tasks=[
            {"name": "capitals", "kind": "answer", "data": "answers.jsonl", "side": "domain"},
            {"name": "labels", "kind": "classify", "data": "labels.jsonl", **general},
            {"name": "letters", "kind": "choice", "data": "choices.jsonl", "side": "general"},
            {"name": "reading", "kind": "perplexity", "data": "answers.jsonl", "side": "general"},
            {
                "name": "form",
                "kind": "format",
                "form": {"kind": "regex", "pattern": ".*"},
                "data": "prompts.jsonl",
                **general,
            },
            {
                "name": "rules",
                "kind": "judge_by_rule",
                "rules": [{"name": "no war", "must_not_match": "war"}],
                "data": "prompts.jsonl",
                **general,
            },
            {"name": "style", "kind": "quality", "data": "prompts.jsonl", "max_new_tokens": 8},
        ],
        eval__faults={"data": "train.jsonl", "list": "faults.jsonl", "max_new_tokens": 8},
    )
    return project


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the runs of the recipes are kept, so that only the first test trains them."""
    return tmp_path_factory.mktemp("kept") / "outputs"


@pytest.fixture
def trained(tasks, kept, capfd):
    if not kept.exists():
        train(TUNED, [], resume=False, overwrite=False)
        capfd.readouterr()
        shutil.copytree("outputs", kept)
    else:
        shutil.copytree(kept, "outputs")
    return tasks


def test_every_kind_is_measured_on_base_and_result(trained, capfd):
    eval_recipe(TUNED, [], [])
    printed = capfd.readouterr().out
    content = json.loads((trained / "outputs/tuned/eval.json").read_text())
    base, tuned = map(ModelResults.from_json, content["models"])
    assert (base.description, tuned.description) == ("base", "tuned")
    names = ["capitals", "labels", "letters", "reading", "form", "rules", "style"]
    assert list(base.tasks) == list(tuned.tasks) == names
    assert set(tuned.faults.by_kind) == {"cut"}
    assert tuned.quality["length"] >= 0
    for name in names:
        assert name in printed
        if base.tasks[name].answers:
            assert len(content["questions"][name]) == len(base.tasks[name].answers)
    change = differences(base.tasks["reading"], tuned.tasks["reading"])["probability"]
    kept = content["differences"]["tuned"]["tasks"]["reading"]["probability"]
    assert kept == {"difference": change.value, "low": change.low, "high": change.high}
    assert set(content["differences"]["tuned"]["sides"]) == {"domain", "general", "quality"}
    for shown in ("labels, tuned", "memorised", "general"):
        assert shown in printed
    page = (trained / "outputs/tuned/eval.html").read_text()
    assert "Labels: labels, tuned" in page
    assert "Capital of Aru, question 0?" in page


def test_a_merged_adapter_answers_as_the_trained_model_did(trained, capfd):
    eval_recipe(TUNED, [], [])
    after = json.loads((trained / "outputs/tuned/after.json").read_text())["answers"]
    assert list(after) == ["capitals"], "training measures the tasks of kind answer alone"
    content = json.loads((trained / "outputs/tuned/eval.json").read_text())
    tuned = ModelResults.from_json(content["models"][1]).tasks["capitals"]
    assert tuned.answers == [row["answer"] for row in after["capitals"]]
    assert tuned.per_question["exact"] == [row["right"] for row in after["capitals"]]


def test_other_models_stand_beside_them_by_folder_recipe_or_run(trained, capfd):
    eval_recipe(TUNED, ["eval.faults=null"], ["base.yaml", "outputs/tuned", "outputs/base/model"])
    content = json.loads((trained / "outputs/tuned/eval.json").read_text())
    results = [ModelResults.from_json(model) for model in content["models"]]
    names = [model.description for model in results]
    assert names == ["base", "tuned", "base (2)", "tuned (2)", "model"]
    for task in ("labels", "form", "rules"):
        distances = [model.tasks[task].figures["kl"] for model in results]
        assert distances[0] == 0 < distances[1] == distances[3]
        assert distances[2] == distances[4] == pytest.approx(0, abs=rounding(8))
        for model in results:
            del model.tasks[task].figures["kl"], model.tasks[task].per_question["kl"]
    assert results[0].tasks == results[2].tasks == results[4].tasks
    assert results[1].tasks == results[3].tasks
    assert all(model.faults is None for model in results)


def test_models_can_be_evaluated_before_anything_was_tuned(trained, change, capfd):
    change("tuned.yaml", name="other")
    with pytest.raises(RunError, match=r"other has no result in .*\. Train it first: yrun train"):
        eval_recipe(TUNED, [], [])
    eval_recipe(TUNED, [], ["outputs/tuned"])
    content = json.loads((trained / "outputs/other/eval.json").read_text())
    assert [model["description"] for model in content["models"]] == ["base", "tuned"]
    assert not RunDir(trained / "outputs/other").is_used(), "it can still be trained"


def test_the_batch_size_changes_no_answer(trained):
    results = []
    for size in (1, 16):
        run = Run.load(TUNED, [f"eval.batch_size={size}"])
        results.append(evaluate(run, run.load_base(), run.result_tokenizer, "b"))
    one, other = results
    assert side_score(one, "general") == pytest.approx(side_score(other, "general"), rel=1e-5)
    for name in one.tasks:
        assert one.tasks[name].answers == other.tasks[name].answers
    assert one.quality == other.quality
    assert one.faults == other.faults


PRINTED = "said", "errors"


def eval_together(rank):
    """What one of several processes does that torch's launcher has started."""
    said, errors = (Path(f"{name}{rank}").open("w") for name in PRINTED)
    with said, errors, redirect_stdout(said), redirect_stderr(errors):
        app(["eval", str(TUNED)], standalone_mode=False)


def test_two_processes_share_the_questions_and_find_what_one_finds(trained):
    eval_recipe(TUNED, [], [])
    page = trained / "outputs/tuned/eval.json"
    alone = json.loads(page.read_text())["models"]
    page.unlink()
    shutil.rmtree(trained / "outputs/.base_results")
    start_ranks(eval_together, number=2)
    said, errors = (
        "".join(Path(f"{name}{rank}").read_text() for rank in (0, 1)) for name in PRINTED
    )
    assert said.count("figures: ") == 1
    assert "style, base: 2/2 (100 %)" in errors, "each has half of the four questions"
    for one, two in zip(alone, json.loads(page.read_text())["models"], strict=True):
        reading, other = one["tasks"].pop("reading"), two["tasks"].pop("reading")
        assert reading["figures"] == pytest.approx(other["figures"], rel=1e-5)
        for name in ("labels", "form", "rules"):
            for kept in ("figures", "per_question"):
                distances = [model["tasks"][name][kept].pop("kl") for model in (one, two)]
                assert distances[0] == pytest.approx(distances[1], rel=1e-4, abs=rounding(8))
        assert one == two


def test_the_base_is_not_asked_again_until_something_changes(trained, change, monkeypatch, capfd):
    eval_recipe(TUNED, [], [])
    first = json.loads((trained / "outputs/tuned/eval.json").read_text())
    assert "earlier run: capitals (" in capfd.readouterr().out, "training has asked for these"

    def evaluated(*overrides):
        """The results, whether the base was loaded, and what was printed."""
        with monkeypatch.context() as patch:
            loaded = []
            load = Run.load_model
            patch.setattr(
                Run,
                "load_model",
                lambda run, source: loaded.append(str(source)) or load(run, source),
            )
            eval_recipe(TUNED, list(overrides), [])
        content = json.loads((trained / "outputs/tuned/eval.json").read_text())
        base = [source for source in loaded if source.endswith("base/model")]
        return content, bool(base), capfd.readouterr().out.replace("\n", " ")

    again, was_loaded, printed = evaluated()
    assert again["models"] == first["models"] and not was_loaded
    every = "capitals, labels, letters, reading, form, rules, style, memorised faults"
    assert f"base results of an earlier run: {every} " in printed
    _, was_loaded, _ = evaluated("eval.batch_size=3")
    assert not was_loaded, "it changes no answer"

    rows = [{"question": "A new one?", "answer": "Belo"}]
    write_jsonl(trained / "answers.jsonl", rows)
    changed, was_loaded, printed = evaluated()
    assert was_loaded and len(changed["models"][0]["tasks"]["capitals"]["answers"]) == 1
    assert "base results of an earlier run: labels, letters, form, rules, style" in printed
    for override in (
        'eval.generation={"kind":"sample"}',
        'data.system="Be brief."',
        "model.dtype=bfloat16",
    ):
        _, was_loaded, printed = evaluated(override)
        assert was_loaded, override
        assert "style" not in printed.partition("earlier run: ")[2].partition("(")[0], override
    assert not evaluated()[1], "the earlier results are still there"


def test_a_reference_that_is_corrected_is_scored_without_asking_the_base_again(
    trained, monkeypatch, capfd
):
    eval_recipe(TUNED, [], [])
    content = json.loads((trained / "outputs/tuned/eval.json").read_text())
    said = content["models"][0]["tasks"]["capitals"]["answers"]
    rows = [
        {"question": question, "answer": answer}
        for (question, _), answer in zip(questions(4), said, strict=True)
    ]
    write_jsonl(trained / "answers.jsonl", rows)
    capfd.readouterr()
    eval_recipe(TUNED, [], [])
    content = json.loads((trained / "outputs/tuned/eval.json").read_text())
    assert content["models"][0]["tasks"]["capitals"]["figures"]["exact"] == 1
    assert "earlier run: capitals, labels" in capfd.readouterr().out.replace("\n", " ")


def test_another_base_is_measured_although_it_has_the_same_name(trained, change, capfd):
    eval_recipe(TUNED, [], [])
    capfd.readouterr()
    change("base.yaml", seed=7)
    train(Path("base.yaml"), [], resume=False, overwrite=True)
    eval_recipe(TUNED, [], [])
    assert "earlier run" not in capfd.readouterr().out


def test_train_and_eval_share_what_the_base_answered(trained, capfd):
    shutil.rmtree(trained / "outputs/.base_results")
    eval_recipe(TUNED, [], [])
    before = (trained / "outputs/tuned/before.json").read_text()
    capfd.readouterr()
    train(TUNED, ["name=again"], resume=False, overwrite=False)
    assert "base results of an earlier run: capitals" in capfd.readouterr().out
    again = json.loads((trained / "outputs/again/before.json").read_text())
    assert again["answers"] == json.loads(before)["answers"]


def test_a_training_shares_only_what_it_would_compute_alike(trained):
    def model(*overrides, **options):
        return kept_results(Run.load(TUNED, list(overrides)), **options).model

    assert model() == model(in_training=True), "in float32"
    half = "model.dtype=bfloat16"
    assert model() != model(half) != model(half, in_training=True)
    onward = Run.load(TUNED, ['tuning={"kind":"lora","adapter":"outputs/tuned/model"}'])
    assert kept_results(onward, in_training=True) is None, "it starts from more than its base"
    before = kept_results(onward).model
    assert before == model()
    assert kept_results(Run.load(Path("base.yaml"))) is None, "a model from scratch has no base"
    (trained / "outputs/base/model/generation_config.json").write_text('{"num_beams": 3}')
    assert kept_results(onward).model != before


def test_without_a_result_eval_of_another_model_says_that_it_is_left_out(trained, change, capfd):
    change("tuned.yaml", name="other")
    eval_recipe(TUNED, [], ["outputs/tuned"])
    assert "other has no result yet: it is left out" in capfd.readouterr().out


def test_eval_without_tasks_or_without_a_result_says_what_to_do(project):
    write_jsonl(project / "texts.jsonl", [{"text": "Belo is a town."}] * 4)
    texts = ["data={train: [{file: texts.jsonl}], targets: all}", "train.stage=cpt"]
    with pytest.raises(YRunnerError, match=r"eval\.tasks, and its rows ask no questions\. Add a"):
        eval_recipe(TUNED, ["eval={}", "loss={kind: plain}", *texts], [])
    with pytest.raises(RunError, match=r"has no result in .*\. Train it first: yrun train"):
        eval_recipe(TUNED, [], [])
    with pytest.raises(RunError, match="base has no result in"):
        eval_recipe(TUNED, [], ["base.yaml"])


@pytest.mark.parametrize(
    ("task", "rows", "reason"),
    [
        ({"kind": "answer"}, [{"question": "a?"}], "without reference answers"),
        ({"kind": "answer"}, [], "has no rows"),
        (
            {"kind": "classify", "labels": ["yes", "no"]},
            [{"question": "a?", "answer": "maybe"}],
            'row 1: label "maybe" is not one of "yes", "no"',
        ),
        ({"kind": "choice"}, [{"question": "a?", "choices": ["b"], "answer": 0}], "row 1: "),
    ],
)
def test_faulty_tasks_are_found_before_a_model_is_loaded(
    project, change, monkeypatch, task, rows, reason
):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Run, "load_model", refuse)
    write_jsonl(project / "task.jsonl", rows)
    change(
        "tuned.yaml",
        eval__tasks=[{"name": "t", "side": "domain", "data": "task.jsonl", **task}],
    )
    with pytest.raises(YRunnerError, match=reason):
        eval_recipe(TUNED, [], [])
    with pytest.raises(YRunnerError, match=reason):
        train(TUNED, [], resume=False, overwrite=False)
    assert not (project / "outputs").exists(), "nor is anything trained"


def test_a_faulty_list_of_faults_is_found_before_a_model_is_loaded(project, change):
    write_jsonl(project / "faults.jsonl", [{"row": 99}])
    change("tuned.yaml", eval__faults={"data": "train.jsonl", "list": "faults.jsonl"})
    for start in (
        lambda: eval_recipe(TUNED, [], []),
        lambda: train(TUNED, [], resume=False, overwrite=False),
    ):
        with pytest.raises(YRunnerError, match='its "row" is "99"'):
            start()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (
            {"kind": "format", "form": {"kind": "regex", "pattern": "("}},
            r'eval\.tasks\.0\.form\.pattern: "\(" is not a valid regular expression: missing \)',
        ),
        (
            {"kind": "judge_by_rule", "rules": [{"name": "a"}]},
            "needs exactly one of must_match and must_not_match",
        ),
        ({"kind": "classify", "labels": ["a"]}, "one label leaves nothing to choose"),
        ({"kind": "classify", "labels": ["a", "a"]}, '"a" is given twice'),
    ],
)
def test_faulty_settings_are_found_with_their_line(project, change, task, reason):
    change(
        "tuned.yaml",
        eval__tasks=[{"name": "t", "side": "domain", "data": "test.jsonl", **task}],
    )
    with pytest.raises(RecipeError, match=reason):
        eval_recipe(TUNED, [], [])


def test_a_recipe_without_tasks_asks_the_rows_that_were_not_learned(trained_base, change, capsys):
    rows = {"train": [{"file": "train.jsonl"}], "validation_share": 0.25}
    change("tuned.yaml", eval={"budget": None}, data=rows)
    train(TUNED, [], resume=False, overwrite=False)
    run = Run.load(TUNED)
    ((task, asked),) = run.tasks
    run.refuse_faulty_rows()  # sets them aside as the training did
    learned = {example.origin for example in run.dataset.train.examples}
    assert task.name == "rows set aside" and len(asked) == 4
    texts = (Path("train.jsonl").read_text("utf-8")).splitlines()
    aside = [json.loads(text) for number, text in enumerate(texts, 1)
             if (Path("train.jsonl").resolve(), number) not in
             {(origin.file, origin.row) for origin in learned}]  # fmt: skip
    assert [question.reference for question in asked] == [row["output"] for row in aside]
    capsys.readouterr()
    eval_recipe(TUNED, [], [])
    said = capsys.readouterr().out
    assert "tuned.yaml has no eval.tasks: base and result answer rows set aside. Add" in said
    shown = json.loads(Path("outputs/tuned/eval.json").read_text("utf-8"))
    assert list(shown["questions"]) == ["rows set aside"] and len(shown["models"]) == 2
    # Other commands measure losses on the same rows.
    fresh = Run.load(TUNED)
    measured = losses_of_rows(fresh, fresh.load_base(), "loss")
    assert (measured.rows, measured.purpose) == (4, "validation")
