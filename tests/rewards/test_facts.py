"""What answers say about a training on rewards, before it and afterwards."""

import random

import pytest

from tests.rewards.conftest import answer, section
from yrunner.losses.policy import correlation
from yrunner.rewards.facts import (
    RewardFacts,
    alarms_of,
    contradictions,
    equal_share,
    first_and_last,
    is_equal,
    nearest,
    reward_facts,
    sentences_about,
)


def test_equal_groups_are_those_whose_known_scores_are_one():
    scores = [1, 1, 1, 0, None, None, None, 1, 0.5, 0.5, 0.5, 0.6]
    facts = reward_facts("r", 2.0, scores, 2)
    assert [is_equal(scores[at : at + 2]) for at in range(0, 12, 2)] == [
        True, False, True, True, True, False,
    ]  # fmt: skip
    assert facts.equal_groups == pytest.approx(4 / 6)
    assert (facts.answers, facts.lowest, facts.highest) == (9, 0, 1)
    assert facts.mean == pytest.approx(6.1 / 9) and facts.median == 0.6
    assert facts.rate is None and facts.advised is None
    nothing = reward_facts("r", 1.0, [None] * 4, 2)
    assert nothing == RewardFacts("r", 1.0, 0, None, None, None, None, 1.0)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [2, 8])
def test_the_expected_share_of_equal_groups_is_that_of_drawn_ones(rate, size):
    chance = random.Random(f"{rate} {size}")
    groups = [[chance.random() < rate for _ in range(size)] for _ in range(20_000)]
    drawn = sum(len(set(group)) == 1 for group in groups) / len(groups)
    assert equal_share(rate, size) == pytest.approx(drawn, abs=0.015)


@pytest.mark.parametrize(
    ("ones", "advised", "sentence"),
    [
        (32, 4, "r: 50% of the answers get it. Of groups of 8, 1% would be all alike and teach"),
        (4, 16, "60% would be all alike and teach nothing; with rollout.generations 16 it would"),
        (1, 64, "with rollout.generations 64 it would be 36%"),
        (0, None, None),
        (64, None, None),
    ],
)
def test_a_binary_reward_comes_with_the_group_size_that_it_needs(ones, advised, sentence):
    facts = reward_facts("r", 1.0, [1.0] * ones + [0.0] * (64 - ones), 8)
    rate = ones / 64
    assert facts.rate == rate
    assert facts.expected_equal == pytest.approx(rate**8 + (1 - rate) ** 8)
    assert facts.advised == advised
    if advised:
        assert equal_share(rate, advised) <= 0.5 < equal_share(rate, advised // 2) or advised == 4
    found = sentences_about(facts, 8)
    assert sentence in found[0] if sentence else not found


def test_no_group_size_helps_a_reward_that_is_too_rare():
    facts = reward_facts("r", 1.0, [1.0] + [0.0] * 999, 8)
    assert facts.advised is None
    assert sentences_about(facts, 8)[0].endswith("teach nothing; use easier prompts")
    facts = reward_facts("r", 1.0, [0.0] + [1.0] * 999, 8)
    assert sentences_about(facts, 8)[0].endswith("use harder prompts")


def alarms(answers, **keys):
    made = section(**keys)
    return alarms_of(made, reward_facts("r", 1.0, [0.0] * len(answers), 2), answers, [0, 0.5, 0, 0])


def test_a_reward_that_never_matched_shows_the_nearest_answer():
    given = [answer(text, row=row, answer="42") for row, text in enumerate(["0", "x", "40", "99"])]
    (sentence,) = alarms(given, kind="number")
    assert sentence.startswith(
        'r: never matched in 4 answers; the nearest was "40" to sums.jsonl row 2, and right is'
        ' "42".'
    )
    texts = ["I do not know", "The answer is forty-three", "The answer is 42 or so", ""]
    given = [answer(text, row=row, answer="42") for row, text in enumerate(texts)]
    assert 'was "The answer is 42 or so" to sums.jsonl row 2' in alarms(given, kind="exact")[0]
    (sentence,) = alarms(given, kind="pattern", pattern="z")
    assert 'was "The answer is forty-three" to sums.jsonl row 1. A reward that' in sentence
    given = [answer(text, answer="42") for text in ("a", "b", "c", "d")]
    assert nearest(section(kind="number"), given, [0, 1, None, 0]) == 1


def test_a_reward_that_is_the_same_for_all_teaches_nothing():
    given = [answer("a"), answer("b")]
    made = section(kind="xml")
    same = reward_facts("r", 1.0, [0.25, 0.25], 2)
    assert alarms_of(made, same, given, [1, 1]) == [
        "r: is 0.25 for each of 2 answers: nothing is learned of it"
    ]
    silent = reward_facts("r", 1.0, [None, None], 2)
    assert alarms_of(made, silent, given, [1, 1]) == ["r: had no opinion of any of 2 answers"]
    assert alarms_of(made, reward_facts("r", 1.0, [0, 1], 2), given, [1, 1]) == []


def test_rewards_contradict_each_other_where_one_falls_as_the_other_rises():
    up, down, flat, holes = [0, 1, 2, 3], [3, 2, 1, 0.5], [1, 1, 1, 1], [None, 0, None, 5]
    assert correlation(up, up) == pytest.approx(1)
    assert correlation(up, down) == pytest.approx(-0.9897, abs=1e-3)
    assert correlation(up, flat) is None
    assert correlation(up, holes) == pytest.approx(1)
    assert correlation([None, 1], [1, None]) is None
    (sentence,) = contradictions(["a", "b", "c", "d"], [up, down, flat, [1, 0, 1, 0.9]])
    assert sentence == (
        "the rewards a and b contradict each other (correlation -0.99): lower the weight of one, "
        "or combine them"
    )


def line(cycle, exact, own, reward):
    return {"cycle": cycle, "rewards": {"exact": exact, "own": own}, "reward": reward}


def test_beginning_and_end_of_a_run_are_a_twentieth_of_its_cycles():
    rewards = [section(kind="exact"), section(kind="python", function="rewards.py:own", name="own")]
    lines = [line(cycle, float(cycle > 20), cycle, 2.0 * cycle) for cycle in range(40)]
    lines += [line(1, 1.0, None, None), line(38, 0.5, None, -1.0)]
    first, last = first_and_last(lines, rewards)
    assert (first.answers, last.answers) == (3, 3), "two cycles of 40, an answer more in one"
    assert first.means == {"exact": pytest.approx(1 / 3), "own": 0.5}
    assert last.means == {"exact": pytest.approx(2.5 / 3), "own": 38.5}
    assert first.whole == {"exact": pytest.approx(1 / 3)}, "a function has no full marks"
    assert last.whole == {"exact": pytest.approx(2 / 3)}
    assert (first.reward, last.reward) == (1.0, pytest.approx((76 + 78 - 1) / 3))
    few, later = first_and_last(lines[:2], rewards)
    assert (few.answers, later.answers) == (1, 1)
    assert first_and_last(lines[:1], rewards) is None and first_and_last([], rewards) is None
