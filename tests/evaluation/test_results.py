"""Differences between models, their intervals and verdicts."""

import json
import random
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from yrunner.data.text_metrics import pieces_of, text_quality
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.results import (
    AT_EQUAL_LENGTH,
    Difference,
    Faults,
    ModelResults,
    TaskResult,
    by_figure,
    differences,
    faults_difference,
    interval_of_means,
    mean_figures,
    side_difference,
    side_score,
)
from yrunner.evaluation.scorers import scorer_of
from yrunner.recipe.schema.eval import QualityTask


def random_scores(generator, num_seeds, num_questions, chance):
    return [
        (generator.random(num_questions) < chance).astype(float).tolist() for _ in range(num_seeds)
    ]


def paired(before, after):
    """The interval of one task with one seed."""
    return interval_of_means([[(before, after)]])


def test_a_difference_that_every_question_has_is_certain():
    low, high = paired([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    assert low == high == pytest.approx(0.25)


def test_the_interval_is_about_two_standard_errors_to_each_side():
    chance = random.Random(0)
    before = [float(chance.random() < 0.5) for _ in range(400)]
    after = [float(chance.random() < 0.7) for _ in range(400)]
    change = np.array(after) - np.array(before)
    error = change.std() / 20
    low, high = paired(before, after)
    assert low == pytest.approx(change.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(change.mean() + 1.96 * error, abs=0.01)


def test_the_interval_is_that_of_drawing_seeds_and_questions_one_by_one():
    generator = np.random.default_rng(3)
    sizes = [30, 12]
    first, second = ([random_scores(generator, 3, size, p) for size in sizes] for p in (0.5, 0.7))
    tasks = [list(zip(*both, strict=True)) for both in zip(first, second, strict=True)]
    chance = random.Random(0)
    drawn = []
    for _ in range(4000):
        seeds = chance.choices(range(3), k=3)
        means = []
        for number, size in enumerate(sizes):
            questions = chance.choices(range(size), k=size)
            means.append(
                fmean(second[number][s][q] - first[number][s][q] for s in seeds for q in questions)
            )
        drawn.append(fmean(means))
    slow = np.quantile(drawn, (0.025, 0.975))
    assert interval_of_means(tasks) == pytest.approx(tuple(slow), abs=0.02)


def test_pairing_takes_out_how_hard_the_questions_are():
    hard = [float(number % 2) for number in range(100)]
    better = [value + (0.1 if number % 3 else 0.0) for number, value in enumerate(hard)]
    low, high = paired(hard, better)
    assert 0 < low < high < 0.1


def test_chance_alone_is_inside_the_interval_in_about_nineteen_cases_of_twenty():
    generator = np.random.default_rng(2)
    noise = 0
    for _ in range(100):
        low, high = paired(*random_scores(generator, 2, 100, 0.5))
        noise += low <= 0 <= high
    assert 88 <= noise <= 100


def test_the_same_seed_gives_the_same_interval():
    tasks = [[([0.0, 0.31, 0.17, 1.0, 0.4], [0.77, 1.0, 0.0, 0.9, 0.03])]]
    assert interval_of_means(tasks, seed=3) == interval_of_means(tasks, seed=3)
    assert interval_of_means(tasks, seed=3) != interval_of_means(tasks, seed=4)


def test_tasks_count_alike_however_many_questions_they_have():
    certain = [([0.0] * 3, [1.0] * 3)]
    none = [([0.0] * 300, [0.0] * 300)]
    assert interval_of_means([certain, none]) == pytest.approx((0.5, 0.5))


def task(values, side="general", **more):
    per_question = {"exact": values}
    figures = {**mean_figures(per_question), **more}
    return TaskResult(side, "answer", "exact", figures, per_question, ["a"] * len(values))


BEFORE = ModelResults(
    "base",
    {"one": task([1.0] * 20), "two": task([1.0] * 10 + [0.0] * 10), "d": task([0.0], "domain")},
    {"repetition_3": 0.1},
    Faults(0.0, [0.0] * 10, {"typos": 0.0}, [""] * 10),
)
AFTER = ModelResults(
    "tuned",
    {"one": task([0.5] * 20), "two": task([1.0] * 10 + [0.0] * 10), "d": task([1.0], "domain")},
    {"repetition_3": 0.2},
    Faults(0.8, [1.0] * 8 + [0.0] * 2, {"typos": 0.8}, [""] * 10),
)


def test_results_survive_json():
    assert ModelResults.from_json(json.loads(json.dumps(AFTER.to_json()))) == AFTER
    newer = AFTER.to_json() | {"later": 1}
    newer["tasks"]["one"]["later"] = 1
    assert ModelResults.from_json(newer) == AFTER


def test_a_side_is_the_mean_of_its_tasks_main_figures():
    assert side_score(BEFORE, "general") == pytest.approx(0.75)
    assert side_score(AFTER, "domain") == 1
    assert side_score(AFTER, "quality") is None
    change = side_difference([(BEFORE, AFTER)], "general")
    assert change.value == pytest.approx(-0.25)
    assert (change.low, change.high) == pytest.approx((-0.25, -0.25))
    assert side_difference([(BEFORE, AFTER)], "quality") is None


def test_several_seeds_have_the_mean_of_their_differences_and_one_interval():
    pairs = [(BEFORE, AFTER), (BEFORE, BEFORE)]
    change = side_difference(pairs, "general")
    assert change.value == pytest.approx(-0.25 / 2)
    assert (change.low, change.high) == pytest.approx((-0.25, 0.0)), "as the seeds are drawn"
    assert faults_difference(pairs).value == pytest.approx(0.4)
    assert faults_difference([*pairs, (BEFORE, ModelResults("x", {}))]) is None
    assert side_difference([*pairs, (BEFORE, ModelResults("x", {}))], "general") is None


def test_a_side_with_a_task_that_is_no_mean_over_questions_has_no_interval():
    score = TaskResult("general", "harness", "score", {"score": 0.5}, {})
    before, after = (
        ModelResults(model.description, {**model.tasks, "harness": score})
        for model in (BEFORE, AFTER)
    )
    assert side_difference([(before, after)], "general") == Difference(pytest.approx(-0.5 / 3))


def test_each_figure_has_its_interval_where_it_is_a_mean_over_questions():
    values = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0]
    found = differences(task(values[0], perplexity=5.0), task(values[1], perplexity=4.0))
    assert found["exact"] == Difference(pytest.approx(0.2), *interval_of_means([[values]]))
    assert found["perplexity"] == Difference(-1.0)
    assert found["perplexity"].as_json() == {"difference": -1.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("difference", "figure", "verdict"),
    [
        (Difference(0.2, 0.1, 0.3), "exact", "better"),
        (Difference(-0.2, -0.3, -0.1), "exact", "worse"),
        (Difference(0.2, 0.1, 0.3), "memorised", "worse"),
        (Difference(-0.2, -0.3, -0.1), "repetition_4", "better"),
        (Difference(0.2, -0.1, 0.5), "exact", ""),
        (Difference(0.2, 0.0, 0.5), "exact", ""),
        (Difference(0.2), "exact", ""),
        (Difference(9.0, 8.0, 10.0), "length", ""),
    ],
)
def test_a_difference_inside_the_noise_has_no_verdict(difference, figure, verdict):
    assert difference.verdict(figure) == verdict


def test_memorised_faults_are_compared_row_by_row():
    change = faults_difference([(BEFORE, AFTER)])
    assert change.value == pytest.approx(0.8)
    assert change.verdict("memorised") == "worse"
    assert faults_difference([(BEFORE, ModelResults("x", {}))]) is None


QUALITY = QualityTask(kind="quality", name="style", data=Path("prompts.jsonl"))


def quality_results(description, answers):
    """The result of a quality task with these answers."""
    scorer = scorer_of(QUALITY)
    rows = [scorer(None, Generated(text, len(text), stopped=True)) for text in answers]
    per_question = by_figure(rows)
    style = TaskResult(
        "quality", "quality", "unrepeated", mean_figures(per_question), per_question, answers
    )
    return ModelResults(description, {"style": style})


def rambling(seed, number=40):
    """Answers with repetition, of English words, Chinese characters and numbers."""
    chance = random.Random(seed)
    words = ["law ", "court ", "法", "院", "的", "1994 ", "rule, ", "may "]
    return ["".join(chance.choices(words, k=chance.randint(9, 120))) for _ in range(number)]


def first_third(text):
    """A third of the pieces of a text; the last may be half a word."""
    wanted = len(pieces_of(text)) // 3
    return next(text[:end] for end in range(len(text) + 1) if len(pieces_of(text[:end])) == wanted)


@pytest.mark.parametrize("seed", range(3))
def test_answers_cut_to_a_third_do_not_read_better(seed):
    whole = rambling(seed)
    base = quality_results("base", whole)
    short = quality_results("tuned", [first_third(text) for text in whole])
    assert side_score(short, "quality") > side_score(base, "quality"), "as they stand, they do"
    for before, after in ((base, short), (short, base)):
        changes = differences(before.tasks["style"], after.tasks["style"])
        for figure in AT_EQUAL_LENGTH:
            assert (changes[figure].value, changes[figure].low) == (0, 0), figure
        assert not any(change.verdict(figure) for figure, change in changes.items())
        assert side_difference([(before, after)], "quality").value == 0


def test_at_equal_length_repetition_is_still_found():
    base = quality_results(
        "base", ["one two three four five six seven eight nine ten eleven twelve"] * 20
    )
    loops = quality_results("tuned", ["one two three four " * 9] * 20)
    change = differences(base.tasks["style"], loops.tasks["style"])["repetition_4"]
    assert change.verdict("repetition_4") == "worse"
    slow = text_quality("one two three four one two three four one two three")["repetition_4"]
    assert change.value == pytest.approx(slow)
    assert side_difference([(base, loops)], "quality").value == pytest.approx(-slow)


def test_the_change_of_a_side_is_at_equal_length_over_seeds_too():
    whole = [rambling(seed, 5) for seed in range(3)]
    pairs = [
        (
            quality_results("one", texts),
            quality_results("other", [first_third(text) for text in texts]),
        )
        for texts in whole
    ]
    change = side_difference(pairs, "quality")
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_an_empty_answer_is_neither_better_nor_worse_to_read():
    base = quality_results("base", rambling(1, 6))
    silent = quality_results("tuned", [""] * 6)
    changes = differences(base.tasks["style"], silent.tasks["style"])
    assert not any(change.verdict(figure) for figure, change in changes.items())
    assert changes["length"].value < 0
