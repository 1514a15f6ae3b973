"""When a preference run warns, and of what."""

import pytest

from yrunner.training.preference.alarms import preference_alarms
from yrunner.training.progress import History, log_line

FIRST = {"step": 1, "loss": 0.69, "reward_accuracy": 0.5, "pairs": 16, "longer_wins": 0.5}


def records(*changes):
    return [{**FIRST, "chosen_log_ratio": 0.0, **change} for change in changes]


@pytest.mark.parametrize(
    ("ratios", "is_alarm"),
    [([0.0], False), ([-5.0], True), ([2.0] * 9 + [-3.0] * 5, True), ([-9.0] + [0.5] * 5, False)],
)
def test_better_answers_below_the_reference_are_an_alarm_with_a_remedy(ratios, is_alarm):
    found = preference_alarms(records(*({"chosen_log_ratio": ratio} for ratio in ratios)))
    assert ("unlearned" in found) == is_alarm
    if is_alarm:
        assert all(word in found["unlearned"] for word in ("loss.sft", "loss.beta", "keep"))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ({"reward_accuracy": 1.0}, "the reference may be wrong"),
        ({"reward_accuracy": 1.0, "longer_wins": 1.0}, "the longer answer is the better one"),
        ({"reward_accuracy": 1.0, "longer_wins": 0.0}, "the longer answer is the worse one"),
        ({"reward_accuracy": 1.0, "longer_wins": 0.95}, "longer wins: 95%"),
        ({"reward_accuracy": 0.99}, None),
        ({"reward_accuracy": 1.0, "pairs": 4}, None),
    ],
)
def test_winning_all_pairs_from_the_start_is_an_alarm(first, said):
    found = preference_alarms(records(first, {"reward_accuracy": 1.0}))
    assert (said is not None) == ("too easy" in found)
    assert said is None or said in found["too easy"]


def test_other_stages_and_rated_answers_have_no_false_alarm():
    assert preference_alarms([]) == preference_alarms([{"step": 1, "loss": 1.0}]) == {}
    rated = {"step": 1, "loss": 0.5, "reward_accuracy": 1.0, "answers": 64}
    assert preference_alarms([rated]) == {}


def test_a_log_shows_an_alarm_once():
    history = History("run", max_steps=9)
    lines = []
    for ratio in (0.0, -40.0, -50.0):
        (record,) = records({"chosen_log_ratio": ratio, "epoch": 1.0})
        history.add(record, 1)
        lines.append(log_line(record, history))
    assert ["less likely" in line for line in lines] == [False, True, False]
    assert "reward accuracy 50%" in lines[0]
