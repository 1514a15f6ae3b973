"""What a critic makes of the answers of a cycle: an advantage and a return of every token."""

# Shapes: T = tokens of an answer, N = tokens of all answers that are learned from

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from yrunner.data.batching.rollouts import Rollout
from yrunner.losses.policy import generalized_advantages, shares, whiten
from yrunner.recipe.schema.rl import PpoLoss


def judged_by_critic(
    rollouts: Sequence[Rollout], fates: Sequence[str], loss: PpoLoss
) -> list[Rollout]:
    """Answers whose values are known, with advantages, returns, and shares in the loss.

    Every token that is learned from has the same share of an update. Only these tokens are
    whitened.
    """
    found = [
        _with_returns(each, loss) if fate == "learned" else each
        for each, fate in zip(rollouts, fates, strict=True)
    ]
    counts_S = torch.tensor(
        [len(each.ids) * (fate == "learned") for each, fate in zip(found, fates, strict=True)]
    )
    share_S = shares(counts_S, "tokens", max_length=1)
    learned = [at for at, fate in enumerate(fates) if fate == "learned"]
    advantage_N = _float64([one for at in learned for one in found[at].advantages or ()])
    if loss.whiten and learned:
        advantage_N = whiten(advantage_N)
    parts = torch.split(advantage_N, counts_S.tolist())
    judged = []
    for each, fate, share, part in zip(found, fates, share_S.tolist(), parts, strict=True):
        is_learned = fate == "learned"
        if is_learned:
            each = replace(each, advantages=part.tolist(), advantage=float(part.mean()))
        judged.append(replace(each, share=share, fate=fate, is_learned=is_learned))
    return judged


def _with_returns(rollout: Rollout, loss: PpoLoss) -> Rollout:
    assert rollout.values is not None
    value_T = _float64(rollout.values)
    advantage_T = generalized_advantages(
        rewards_by_token(rollout, loss.beta), value_T, gamma=loss.gamma, lam=loss.lam
    )
    returns = (advantage_T + value_T).tolist()
    return replace(rollout, advantages=advantage_T.tolist(), returns=returns)


def rewards_by_token(rollout: Rollout, beta: float) -> Tensor:
    """The reward at the last token, less beta times the log ratio to the reference at each, [T].

    As in InstructGPT, arXiv:2203.02155, section 3.4; the sum is the reward less beta times an
    estimate of the KL of the answer.
    """
    reward_T = torch.zeros(len(rollout.ids), dtype=torch.float64)
    if beta:
        assert rollout.old is not None and rollout.reference is not None
        reward_T -= beta * (_float64(rollout.old) - _float64(rollout.reference))
    assert rollout.reward is not None, "an answer without a reward is not learned from"
    reward_T[-1] += rollout.reward
    return reward_T


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
