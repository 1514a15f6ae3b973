"""Alarms of an rl run: each names its remedy, and none comes where nothing is wrong."""

import pytest

from yrunner.training.rl.alarms import rollout_alarms

SOUND = {
    "equal_groups": 0.2,
    "learned": 0.8,
    "reward": 0.5,
    "truncated": 0.05,
    "entropy": 0.9,
    "answer_tokens": 40.0,
    "agreement_exact/xml": 0.4,
}


def records(*changes, first=5):
    """Five sound records, and five with these changes."""
    return [SOUND] * first + [SOUND | change for change in changes for _ in range(5)]


def test_a_sound_run_has_no_alarm():
    better = {"answer_tokens": 100.0, "reward": 0.8, "entropy": 0.3, "equal_groups": 0.45}
    assert not rollout_alarms(records(better))
    assert not rollout_alarms([])
    assert not rollout_alarms([{"loss": 1.0, "step": 1}])


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"equal_groups": 0.8}, "equal groups", ["80% of the groups", "harder or more mixed"]),
        ({"equal_groups": 0.8, "reward": 0.0}, "equal groups", ["easier prompts, give part"]),
        ({"equal_groups": 1.0, "learned": 0.0}, "no reward", ["nothing was learned", "easier"]),
        ({"truncated": 1.0, "learned": 0.0}, "truncated", ["100% of the answers", "mask learns"]),
        ({"explained_variance": -0.4}, "critic", ["worse than a constant", "-0.40", "loss.lam"]),
        ({"truncated": 0.7}, "truncated", ["70% of the answers", "rollout.max_new_tokens"]),
        ({"entropy": 0.01}, "entropy", ["0.9 to 0.01", "train.learning_rate", "loss.beta"]),
        ({"answer_tokens": 120.0}, "length", ["40 to 120 tokens", "not better", "length"]),
        (
            {"agreement_exact/xml": -0.6},
            "contradiction agreement_exact/xml",
            ["exact and xml contradict", "-0.60", "weight"],
        ),
    ],
)
def test_an_alarm_names_figures_and_remedy(change, name, words):
    found = rollout_alarms(records(change))
    assert list(found) == [name]
    for word in words:
        assert word in found[name]
