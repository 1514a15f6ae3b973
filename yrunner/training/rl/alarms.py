"""Warnings of an rl run: why nothing is learned, or what goes wrong where something is."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from yrunner.losses.policy import CONTRARY

Record = Mapping[str, Any]
"""One line of the metrics."""

LATEST = 5
"""Training records whose mean is judged: one of them is noisy."""
TOO_MANY = 0.5
"""Share of groups without variance, or of answers that are cut off."""
COLLAPSED = 0.1
"""Entropy as a share of that of the first records, below which it has collapsed."""
WORSE = -0.1
"""Explained variance of a critic; around 0 it says nothing yet, and does no harm."""
LITTLE = 0.05
"""Nats per token: an entropy below it is small in any case."""
LONGER = 2.0
"""Answers this many times as long as in the first records run away, unless the reward rises."""


def rollout_alarms(records: Sequence[Record]) -> dict[str, str]:
    """A sentence for each alarm that the training records so far give, by its name."""
    judged = [record for record in records if "learned" in record]
    if not judged:
        return {}
    first, last = judged[:LATEST], judged[-LATEST:]
    found = {
        "no reward": _no_reward(last),
        "equal groups": _equal_groups(last),
        "truncated": _truncated(last),
        "entropy": _entropy(first, last),
        "length": _length(first, last),
        "critic": _critic(last),
    }
    found |= {f"contradiction {name}": text for name, text in _contradictions(last).items()}
    return {name: sentence for name, sentence in found.items() if sentence}


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return mean(values) if values else None


def _no_reward(records: Sequence[Record]) -> str:
    if len(records) < LATEST or any(record["learned"] for record in records):
        return ""
    if (_mean(records, "equal_groups") or 0.0) < 1:
        # Their answers are cut off and masked: another alarm.
        return ""
    return (
        f"nothing was learned in {len(records)} records: no group had two different rewards "
        f"(mean reward {_mean(records, 'reward'):.3g}). Look at rollouts.jsonl, give part marks "
        "(rewards of kind xml or length), or begin with easier prompts"
    )


def _equal_groups(records: Sequence[Record]) -> str:
    share = _mean(records, "equal_groups") or 0.0
    if share <= TOO_MANY or not any(record["learned"] for record in records):
        return ""
    if (_mean(records, "reward") or 0.0) > 0:
        remedy = (
            "use harder or more mixed prompts, or raise rollout.generations or rollout.temperature"
        )
    else:
        remedy = "use easier prompts, give part marks, or raise rollout.generations"
    return f"{share:.0%} of the groups have equal rewards and teach nothing: {remedy}"


def _truncated(records: Sequence[Record]) -> str:
    share = _mean(records, "truncated") or 0.0
    if share <= TOO_MANY:
        return ""
    return (
        f"{share:.0%} of the answers are cut off: raise rollout.max_new_tokens, set "
        "rollout.truncated to penalise (mask learns nothing from them), or add a reward of kind "
        "length"
    )


def _entropy(first: Sequence[Record], last: Sequence[Record]) -> str:
    before, now = _mean(first, "entropy"), _mean(last, "entropy")
    if before is None or now is None or len(last) < LATEST:
        return ""
    if now >= COLLAPSED * before or now >= LITTLE:
        return ""
    return (
        f"the entropy has collapsed ({before:.3g} to {now:.3g} nats per token), and the answers to "
        "a prompt are all alike: lower train.learning_rate, raise loss.beta or loss.clip_high, or "
        "stop here"
    )


def _length(first: Sequence[Record], last: Sequence[Record]) -> str:
    before, now = _mean(first, "answer_tokens"), _mean(last, "answer_tokens")
    reward_before, reward_now = _mean(first, "reward"), _mean(last, "reward")
    if not before or now is None or reward_before is None or reward_now is None:
        return ""
    if now < LONGER * before or reward_now > reward_before + abs(reward_before) / 10:
        return ""
    return (
        f"the answers grow longer ({before:.0f} to {now:.0f} tokens) and not better: add a reward "
        "of kind length or repetition, or set loss.normalize to length"
    )


def _critic(records: Sequence[Record]) -> str:
    explained = _mean(records, "explained_variance")
    if explained is None or len(records) < LATEST or explained >= WORSE:
        return ""
    return (
        f"the critic's values are worse than a constant (explained variance {explained:.2f}), so "
        "the advantages are mostly noise: raise loss.lam to 1 or rollout.generations, or learn "
        "more slowly"
    )


def _contradictions(records: Sequence[Record]) -> dict[str, str]:
    names = dict.fromkeys(
        name for record in records for name in record if name.startswith("agreement_")
    )
    found = {}
    for name in names:
        value = _mean(records, name)
        if value is not None and value < CONTRARY:
            pair = name.removeprefix("agreement_").replace("/", " and ")
            found[name] = (
                f"the rewards {pair} contradict each other (correlation {value:+.2f}): lower the "
                "weight of one, or let it count only where the other is met"
            )
    return found
