"""What is said about the length of answers, beside the figures."""

import pytest

from yrunner.evaluation.figure_lines import length_notes
from yrunner.evaluation.results import ModelResults, TaskResult


def results(description, **lengths):
    tasks = {
        name: TaskResult("general", "answer", "exact", {"exact": 0.0, "length": length}, {})
        for name, length in lengths.items()
    }
    return ModelResults(description, tasks)


def test_answers_that_shrank_or_grew_get_a_sentence():
    base = results("base", facts=30.0, prompts=100.0, manners=20.0)
    tuned = results("tuned", facts=10.0, prompts=81.0, manners=40.0)
    first, second = length_notes([base, tuned])
    assert first == (
        "facts: the answers of tuned have 33% of the length of those of base (10 instead of 30 "
        "words or Chinese characters)"
    )
    assert second.startswith("manners: the answers of tuned have 200% of the length")


@pytest.mark.parametrize(("before", "after"), [(0.0, 5.0), (10.0, 8.0), (8.0, 10.0), (3.0, 3.0)])
def test_answers_alike_in_length_need_no_sentence(before, after):
    assert not length_notes([results("base", t=before), results("tuned", t=after)])


def test_one_model_alone_and_tasks_without_a_length_need_none():
    assert not length_notes([results("base", t=9.0)])
    bare = ModelResults("b", {"t": TaskResult("domain", "choice", "accuracy", {}, {})})
    assert not length_notes([bare, bare])
