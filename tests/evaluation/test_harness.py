"""lm-evaluation-harness on a task of our own, and what happens where it is missing."""

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml

from tests.evaluation.test_tasks import reply_loss
from yrunner.errors import MissingError, YRunnerError
from yrunner.evaluation import harness
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.tasks import read_task, run_task
from yrunner.recipe.schema.eval import HarnessTask

CHOICES = ["Belo", "Dane", "Fane is the capital"]
ROWS = [{"question": f"Capital {number}?", "answer": number % 3} for number in range(6)]


@pytest.fixture(scope="module", autouse=True)
def few_of_its_own_tasks():
    """It reads the files of all of its tasks, some 14,000, to list their names; here only a few."""
    index = pytest.importorskip("lm_eval.tasks._index").TaskIndex
    files = index._iter_yaml_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_iter_yaml_files", lambda root: islice(files(root), 20))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the harness: one to choose, one to write."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {
        "task": "capitals_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        "task": "capitals_written",
        "output_type": "generate_until",
        "doc_to_target": "Belo",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    for content in (choosing, writing):
        (folder / f"{content['task']}.yaml").write_text(yaml.safe_dump(source | content))
    return folder


def make_task(folder, *names, **settings):
    return HarnessTask(
        kind="harness", name="h", side="general", tasks=list(names), include=folder, **settings
    )


def test_without_the_harness_the_command_that_adds_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        MissingError, match=r"needs lm-evaluation-harness\. Install it: pip install"
    ):
        read_task(make_task(folder, "capitals_choice"))


def test_a_task_that_nobody_knows_is_found_before_a_model_is_loaded(folder):
    with pytest.raises(
        YRunnerError, match=r'h: lm-evaluation-harness with .* has no task "capitals_chosen"'
    ):
        read_task(make_task(folder, "capitals_chosen"))
    with pytest.raises(
        YRunnerError, match=r'lm-evaluation-harness has no task "capitals_choice"\. '
    ):
        read_task(make_task(None, "capitals_choice"))


@pytest.fixture
def evaluated(make_talker, capitals_tokenizer):
    return EvaluatedModel(make_talker(seed=3), capitals_tokenizer, batch_size=4)


def test_a_local_task_gives_the_figures_of_its_likelihoods(folder, evaluated, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    task = make_task(folder, "capitals_choice")
    assert read_task(task) == []
    result = run_task(task, [], evaluated)
    hits = []
    for row in ROWS:
        # The harness leaves the end mark out.
        costs = [sum(reply_loss(evaluated, row["question"], text)[:-1]) for text in CHOICES]
        by_length = [cost / len(text) for cost, text in zip(costs, CHOICES, strict=True)]
        hits.append(float(by_length.index(min(by_length)) == row["answer"]))
    assert result.per_question == {"score": hits}
    assert result.figures["capitals_choice/acc_norm"] == sum(hits) / len(hits)
    assert result.figures["score"] == sum(hits) / len(hits)
    assert set(result.figures) == {"score", "capitals_choice/acc", "capitals_choice/acc_norm"}


def test_several_tasks_count_alike(folder, evaluated, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    task = make_task(folder, "capitals_choice", "capitals_written", limit=3)
    result = run_task(task, read_task(task), evaluated)
    main = [
        result.figures[f"capitals_{name}"] for name in ("choice/acc_norm", "written/exact_match")
    ]
    assert result.figures["score"] == sum(main) / 2
    assert result.headline == "score"
    assert result.per_question == {}
