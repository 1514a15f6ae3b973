"""Rows on one subject that answer nearly alike contradict each other."""

from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring.questions import (
    LONGEST_ANSWER,
    MOST_OF_A_SUBJECT,
    WEIGHT,
    find_contradictions,
    subjects,
    with_contradictions,
)
from yrunner.tokens import IGNORE_INDEX

WHICH, WHAT = [11, 12, 13], [14, 15, 16, 17, 18]
"""Two ways to ask."""
NAMES = range(50, 70)
END = 9


def make_example(question, answer):
    ids = [1, *question, *answer]
    labels = [IGNORE_INDEX] * (1 + len(question)) + [*answer]
    return TokenizedExample(ids, labels, Origin(Path("rows.jsonl"), 1))


def say(value, name):
    """An answer of ten tokens, with a value of two."""
    return [20, 21, 22, value, value + 1, 23, 24, name, 25, END]


def make_corpus(**answers):
    """Two rows on each of the names, with the same answer; but for those rows that are given."""
    rows = []
    for name in NAMES:
        for way, ask in (("which", WHICH), ("what", WHAT)):
            rows.append(
                make_example([*ask, name], answers.get(f"{way}_{name}", say(name * 2, name)))
            )
    return rows


def found_in(rows):
    return find_contradictions(rows, [str(row) for row in range(len(rows))])


def test_rows_that_agree_contradict_nothing():
    assert found_in(make_corpus()) == {}


def test_both_rows_of_a_pair_are_found_and_the_place_is_named():
    found = found_in(make_corpus(what_52=say(700, 52)))
    assert found.keys() == {4, 5}
    wrong = found[5]
    assert wrong.against == 4
    assert wrong.targets == (3, 4)
    assert wrong.said == (700, 701)
    assert wrong.instead == (104, 105)
    # Eight of ten tokens are alike, nobody else answers this row, 19 of 20 pairs agree.
    assert wrong.strength == pytest.approx(0.8 * 1 * 19 / 20)


def test_of_three_rows_the_one_that_stands_alone_is_found():
    rows = make_corpus(what_52=say(700, 52))
    found = found_in([*rows, make_example([*WHICH, *WHICH[::-1], *WHAT, 52], say(104, 52))])
    assert found.keys() == {5}
    assert found[5].strength == pytest.approx(0.8 * 20 / 22)


def test_a_word_too_few_or_too_many_is_a_contradiction():
    shorter = say(104, 52)
    del shorter[6]
    found = found_in(make_corpus(what_52=shorter))
    assert (found[5].targets, found[5].said, found[5].instead) == ((6,), (), (24,))
    assert (found[4].targets, found[4].said, found[4].instead) == ((6,), (24,), ())


def test_rows_on_different_subjects_may_differ():
    rows = [make_example([*WHICH, name], say(name * 2, 7)) for name in NAMES]
    assert found_in(rows) == {}


@pytest.mark.parametrize(("number", "other"), [((4,), (3, 4)), ((3, 4), (4, 3)), ((), (4,))])
def test_questions_that_differ_in_a_number_have_different_subjects(number, other):
    rows = make_corpus()
    rows[4] = make_example([*WHICH, *number, 52], say(104, 52))
    rows[5] = make_example([*WHICH, *other, 52], say(700, 52))
    # Their digits are as common as any word.
    rows += [make_example([*WHAT, 3, 4, *WHICH, name], say(1, name)) for name in range(200, 230)]
    assert subjects(rows)[4] == subjects(rows)[5]
    assert found_in(rows) == {}


def test_other_answers_on_the_same_subject_are_no_contradiction():
    found = found_in(make_corpus(what_52=[30, 31, 32, 33, 34, 35, 36, 52, 25, END]))
    assert found == {}


def test_where_most_answers_are_worded_in_their_own_way_a_difference_means_little():
    agreeing = found_in(make_corpus(what_52=say(700, 52)))[5].strength
    worded = {f"what_{name}": say(name * 7, name) for name in NAMES if name != 60}
    assert found_in(make_corpus(**worded))[5].strength < agreeing / 10


def test_parts_and_copies_of_a_row_are_not_compared():
    rows = make_corpus(what_52=say(700, 52))
    groups = [str(row) for row in range(len(rows))]
    groups[5] = groups[4]
    assert find_contradictions(rows, groups) == {}


def test_tasks_and_long_texts_are_not_compared():
    many = [make_example([*WHICH, 50], say(row * 3, 50)) for row in range(MOST_OF_A_SUBJECT + 1)]
    others = [make_example([*WHAT, name], say(5, name)) for name in range(100, 150)]
    assert found_in([*many, *others]) == {}
    long = [1] * LONGEST_ANSWER
    pair = [make_example([*WHICH, 50], [*long, last]) for last in (2, 3)]
    assert found_in([*pair, *others]) == {}


def test_rows_without_questions_or_answers_contradict_nothing():
    assert found_in([]) == {}
    assert found_in([make_example([], say(1, 2)), make_example([], say(3, 2))]) == {}
    assert found_in([make_example([*WHICH, 50], []), make_example([*WHAT, 50], [])]) == {}


def test_a_subject_is_the_rare_tokens_of_a_question():
    rows = make_corpus()
    found = subjects(rows)
    assert len(set(found)) == len(NAMES)
    assert found[0::2] == found[1::2]
    assert subjects([make_example([7], [8]), make_example([7], [9])]) == [b"", b""]


def test_a_contradiction_raises_the_mean_of_its_row_at_the_places_that_differ():
    found = found_in(make_corpus(what_52=say(700, 52)))
    before = [torch.zeros(10) for _ in NAMES for _ in range(2)]
    after = with_contradictions(before, found)
    assert after[5].mean().item() == pytest.approx(WEIGHT * found[5].strength)
    assert after[5].nonzero().flatten().tolist() == [3, 4]
    assert not after[0].any() and not before[5].any()
