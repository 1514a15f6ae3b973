"""`yrun check` lets the base answer a few prompts, and says what rewards make of the answers."""

import json

import pytest

from tests.conftest import write_jsonl
from yrunner.commands.check.command import check
from yrunner.errors import RunError, YRunnerError

RECIPE = "rewarded.yaml"


@pytest.fixture
def checked(rewarded, capfd):
    """What check prints of the recipe in the folder, with overrides."""

    def checked(*overrides, as_machine=False, sample=4, trust_code=False):
        capfd.readouterr()
        check(
            rewarded / RECIPE,
            list(overrides),
            as_machine=as_machine,
            sample=sample,
            trust_code=trust_code,
        )
        found = capfd.readouterr()
        return json.loads(found.out) if as_machine else found.out + found.err

    return checked


def test_each_reward_has_its_distribution_and_the_run_its_time(checked):
    facts = checked(as_machine=True)["rollouts"]
    assert facts["prompts"] == 4 and facts["generations"] == 4 and len(facts["answers"]) == 16
    pattern, repetition = facts["rewards"]
    scores = [answer["rewards"]["pattern"] for answer in facts["answers"]]
    assert {*scores} <= {0.0, 1.0}
    assert pattern["mean"] == pattern["rate"] == pytest.approx(sum(scores) / 16)
    groups = [scores[at : at + 4] for at in range(0, 16, 4)]
    assert pattern["equal_groups"] == sum(len({*group}) == 1 for group in groups) / 4
    rate = pattern["rate"]
    assert pattern["expected_equal"] == pytest.approx(rate**4 + (1 - rate) ** 4)
    for answer in facts["answers"]:
        parts = answer["rewards"]
        assert answer["reward"] == pytest.approx(
            parts["pattern"] + 0.1 * (parts["repetition"] or 0.0)
        )
    assert repetition["rate"] is None or repetition["highest"] <= 1
    assert facts["truncated"] == sum(it["is_truncated"] for it in facts["answers"]) / 16
    assert 0 < facts["seconds_per_update"] < facts["seconds"]


def test_the_same_answers_are_drawn_each_time_and_shown(checked):
    first, second = (checked(as_machine=True)["rollouts"]["answers"] for _ in range(2))
    assert first == second
    shown = checked()
    assert "Rewards of 16 answers by the base, 4 to a prompt" in shown
    assert "time on this machine: about " in shown and "ready to train" in shown
    assert "Length of the training prompts in tokens" in shown and "targets:" not in shown
    best = max(first, key=lambda it: it["reward"])
    assert f"prompts.jsonl row {best['row']}: {best['reward']:.3g}" in shown
    assert "answers of the base: switched off (--sample 0)" in checked(sample=0)


def test_a_reward_that_never_matches_is_said_before_the_training(checked):
    shown = checked("rewards=[{kind: exact, name: right}, {kind: repetition}]")
    assert "right: never matched in 16 answers; the nearest was " in shown
    assert "check its settings against that answer" in shown


def test_rows_without_what_a_reward_needs_are_refused_as_in_training(checked, rewarded):
    rows = [{"prompt": f"Who is {n}?", "answer": str(n)} for n in range(16)]
    write_jsonl(rewarded / "prompts.jsonl", [*rows, {"prompt": "And who?"}])
    without_validation = ["rewards=[{kind: number}]", "data.validation=[]"]
    with pytest.raises(YRunnerError) as caught:
        checked(*without_validation, sample=0)
    assert 'prompts.jsonl row 17: "answer" is missing, which the reward "number" needs' in str(
        caught.value
    )
    checked(*without_validation, "data.invalid=drop", sample=0)


def test_a_function_is_run_only_with_trust_and_fails_in_one_sentence(checked, rewarded):
    (rewarded / "rewards.py").write_text(
        "def judge(completions, answer):\n    return [1 / 0 for text in completions]\n"
    )
    override = "rewards=[{kind: python, function: rewards.py:judge}]"
    with pytest.raises(RunError, match=r"rewards\.py:judge would run here .* add --trust-code"):
        checked(override)
    with pytest.raises(YRunnerError) as caught:
        checked(override, trust_code=True)
    assert "prompts.jsonl row " in str(caught.value)
    assert "rewards.py:2: ZeroDivisionError: division by zero" in str(caught.value)
    with pytest.raises(YRunnerError):
        checked(override, trust_code=True, as_machine=True)
