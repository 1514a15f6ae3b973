"""The sums to log of an rl run, and the figures made of them.

A record has the sums of a micro-batch, or those of the answers that an update learns from; the
rest of it is zero.
"""

# Shapes: P = prompts, G = answers to each, S = answers

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from yrunner.data.batching.rollouts import Rollout
from yrunner.losses.policy import correlation, explained_variance, is_without_variance
from yrunner.training.metrics import Figures
from yrunner.training.rl.collect import rewards_tensor

OF_MICRO_BATCHES = ("loss", "targets", "clipped", "entropy", "kl", "change")
OF_ANSWERS = (
    "updates",
    "answers",
    "rated",
    "reward",
    "groups",
    "equal_groups",
    "replaced",
    "deviation",
    "truncated",
    "tokens",
    "learned",
    "seconds",
)
OF_CRITICS = (
    "policy_loss",
    "value_loss",
    "value_clipped",
    "value",
    "return",
    "valued",
    "explained",
    "explainable",
)
"""`explained` adds up shares of the variance, `explainable` the updates that have one."""


class RolloutFigures:
    """Records, by the names of the rewards."""

    def __init__(
        self,
        rewards: Sequence[str],
        *,
        generations: int,
        has_reference: bool,
        resamples: bool = False,
        has_critic: bool = False,
    ) -> None:
        self.rewards = list(rewards)
        self.generations = generations
        self.has_reference, self.resamples = has_reference, resamples
        self.has_critic = has_critic
        self.pairs = list(combinations(range(len(self.rewards)), 2))
        parts = [f"{what}_{at}" for at in range(len(self.rewards)) for what in ("score", "scored")]
        agreement = [f"{what}_{a}_{b}" for a, b in self.pairs for what in ("agreed", "compared")]
        of_critic = OF_CRITICS if has_critic else ()
        self.names = (*OF_MICRO_BATCHES, *OF_ANSWERS, *of_critic, *parts, *agreement)

    def record(self, sums: dict[str, float | Tensor], device: torch.device) -> Tensor:
        """A record with these sums, float64."""
        values = [sums.get(name, 0.0) for name in self.names]
        return torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        )

    def sums_of_answers(
        self, rollouts: Sequence[Rollout], seconds: float, num_replaced: int = 0
    ) -> dict[str, float | Tensor]:
        """The sums of the answers that an update learns from: whole groups, side by side.

        `num_replaced`: answers of the groups that they have replaced.
        """
        reward_S = rewards_tensor(rollouts)
        reward_PG = reward_S.view(-1, self.generations)
        is_equal_P = is_without_variance(reward_PG)
        sums: dict[str, float | Tensor] = {
            "updates": 1,
            "answers": len(rollouts),
            "rated": (~reward_S.isnan()).sum(),
            "reward": reward_S.nansum(),
            "groups": len(reward_PG),
            "equal_groups": is_equal_P.sum(),
            "replaced": num_replaced / self.generations,
            "deviation": sum(_deviation(group) for group in reward_PG),
            "truncated": sum(each.is_truncated for each in rollouts),
            "tokens": sum(each.num_tokens for each in rollouts),
            "learned": sum(each.fate == "learned" for each in rollouts),
            "seconds": seconds,
        }
        if self.has_critic:
            sums |= _sums_of_values(rollouts)
        columns = [[each.scores[at] for each in rollouts] for at in range(len(self.rewards))]
        for at, column in enumerate(columns):
            known = [score for score in column if score is not None]
            sums |= {f"score_{at}": sum(known), f"scored_{at}": len(known)}
        for a, b in self.pairs:
            agreement = correlation(columns[a], columns[b])
            if agreement is not None:
                sums |= {f"agreed_{a}_{b}": agreement, f"compared_{a}_{b}": 1}
        return sums

    def figures(self, sums: Sequence[float]) -> Figures:
        """The figures of summed records, under their names in metrics.jsonl.

        `loss` is that of an update; it starts near 0, whatever the rewards. `reward` and its parts
        are means over answers, before `weight`. `entropy`, `clipped` and `kl` are per token. So are
        the figures of a critic; `explained_variance` is that of the returns, by the values that the
        critic gave before the update.
        """
        of = dict(zip(self.names, sums, strict=True))
        updates, answers, targets = (max(of[name], 1) for name in ("updates", "answers", "targets"))
        figures = {"loss": of["loss"] / updates, "reward": of["reward"] / max(of["rated"], 1)}
        for at, name in enumerate(self.rewards):
            if of[f"scored_{at}"] and len(self.rewards) > 1:
                figures[f"reward_{name}"] = of[f"score_{at}"] / of[f"scored_{at}"]
        if not self.has_critic:
            # A critic compares no groups.
            figures["reward_deviation"] = of["deviation"] / max(of["groups"], 1)
            figures["equal_groups"] = of["equal_groups"] / max(of["groups"], 1)
        figures |= {
            **({"replaced_groups": of["replaced"] / updates} if self.resamples else {}),
            "truncated": of["truncated"] / answers,
            "answer_tokens": of["tokens"] / answers,
            "learned": of["learned"] / answers,
        }
        if of["targets"]:
            figures |= {
                "entropy": of["entropy"] / targets,
                "clipped": of["clipped"] / targets,
                "policy_change": of["change"] / targets,
            }
            if self.has_reference:
                figures["kl"] = of["kl"] / targets
        if self.has_critic:
            figures |= _figures_of_values(of, updates, targets)
        for a, b in self.pairs:
            if number := of[f"compared_{a}_{b}"]:
                name = f"agreement_{self.rewards[a]}/{self.rewards[b]}"
                figures[name] = of[f"agreed_{a}_{b}"] / number
        figures |= {
            "rollout_seconds": of["seconds"] / updates,
            "answers": int(of["answers"]),
            "targets": int(of["targets"]),
        }
        return figures


def _deviation(group_G: Tensor) -> float:
    """Standard deviation of the known rewards of a group."""
    known = group_G[~group_G.isnan()]
    return float(known.std()) if len(known) > 1 else 0.0


def _sums_of_values(rollouts: Sequence[Rollout]) -> dict[str, float | Tensor]:
    """What the critic expected of the answers that are learned from, and what it should have."""
    learned = [each for each in rollouts if each.is_learned]
    value_N, return_N = (
        torch.tensor([one for each in learned for one in getattr(each, name)], dtype=torch.float64)
        for name in ("values", "returns")
    )
    share = explained_variance(value_N, return_N)
    sums: dict[str, float | Tensor] = {
        "value": value_N.sum(),
        "return": return_N.sum(),
        "valued": len(value_N),
    }
    return sums if share is None else sums | {"explained": share, "explainable": 1}


def _figures_of_values(of: dict[str, float], updates: float, targets: float) -> Figures:
    figures = {name: of[name] / updates for name in ("policy_loss", "value_loss")}
    figures["value_clipped"] = of["value_clipped"] / targets
    valued = max(of["valued"], 1)
    figures |= {"value": of["value"] / valued, "return": of["return"] / valued}
    if of["explainable"]:
        figures["explained_variance"] = of["explained"] / of["explainable"]
    return figures
