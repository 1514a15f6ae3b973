"""Let the model write answers, have them judged, and find out what to learn from each.

All ranks take part: each writes and judges its share of the answers, and then holds all of them.
"""

# Shapes: P = prompts, G = answers to each, S = answers, T = tokens of an answer, N = of all learned

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from yrunner.data.batching.answers import collate_with_owners
from yrunner.data.batching.packing import batches_by_length
from yrunner.data.batching.rollouts import Rollout, as_example
from yrunner.data.dataset.prompts import PromptRow
from yrunner.distributed.collectives import gather_over_ranks, num_ranks, this_rank
from yrunner.losses.fused_head import attach
from yrunner.losses.log_probs import LogProbRequest, measure_log_probs
from yrunner.losses.policy import (
    generalized_advantages,
    group_advantages,
    is_without_variance,
    leave_one_out_advantages,
    shares,
    whiten,
)
from yrunner.models.limits import evaluating
from yrunner.recipe.schema.recipe import PolicyLoss
from yrunner.recipe.schema.rl import (
    GrpoLoss,
    PolicySettings,
    PpoLoss,
    RlooLoss,
    RolloutSection,
)
from yrunner.scoring.base_predictions import adapter_off, to_device

TRAINING, VALIDATION = 0, 1
"""What an answer is written for: each draws other random numbers."""


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt to write an answer to; the seed alone decides its random draws."""

    ids: tuple[int, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class WrittenAnswer:
    """What the model wrote."""

    ids: list[int]
    """All tokens, with the end mark."""
    text: str
    num_tokens: int
    """Without the end mark."""
    is_truncated: bool


class WriteAnswers(Protocol):
    """Writes an answer to each prompt, in order."""

    def __call__(self, asked: Sequence[AskedPrompt]) -> list[WrittenAnswer] | None:
        """None where a signal interrupted it."""


ScoreAnswers = Callable[
    [Sequence[PromptRow], Sequence[WrittenAnswer]],
    tuple[list[list[float | None]], list[float | None]],
]
"""The scores of each answer by every reward, and their weighted sum."""


def settings_of(loss: PolicyLoss) -> PolicySettings:
    """How the gradient of a loss is computed; RLOO's ratio is of whole answers, PPO's of tokens."""
    if isinstance(loss, GrpoLoss):
        return loss.settings
    is_ppo = isinstance(loss, PpoLoss)
    return PolicySettings(
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        beta=loss.beta,
        scale="none",
        normalize="tokens" if is_ppo else "sequence",
        ratio="token" if is_ppo else "sequence",
    )


@dataclass(frozen=True)
class Collected:
    """What was written for a cycle."""

    rollouts: list[Rollout]
    """The answers that are learned from, whole groups side by side."""
    replaced: list[Rollout]
    """Those of groups without variance, which others have replaced."""
    seconds: float


@dataclass
class Collector:
    """Collects the answers of a cycle."""

    model: Any
    prompts: Sequence[PromptRow]
    """To train on."""
    write: WriteAnswers
    score: ScoreAnswers
    loss: PolicyLoss
    rollout: RolloutSection
    seed: int
    pad_token_id: int
    max_tokens: int
    """Tokens to compute at once."""
    reference: Any = None
    """A copy of the model as the run began; None: `model` with its adapter off."""
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    whole_model: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Holds all weights in each process, where ZeRO stage 3 shards them."""

    def collect(self, cycle: int, asked: Sequence[int], others: Iterator[int]) -> Collected | None:
        """The answers of a cycle, whole groups side by side.

        `asked`: its prompts. `others`: those that groups without variance are replaced by. None
        where a signal interrupted it. A collective call.
        """
        started = time.perf_counter()
        with self.whole_model():
            groups = self._groups(cycle, asked)
            replaced: list[Rollout] = []
            for _ in range(self.rollout.resample):
                if groups is None:
                    break
                groups = self._resampled(cycle, groups, others, replaced)
            if groups is None:
                return None
            found = self._measured(list(chain.from_iterable(groups)))
        return Collected(self._judged(found), replaced, time.perf_counter() - started)

    def _groups(self, cycle: int, asked: Sequence[int]) -> list[list[Rollout]] | None:
        """The answers to some prompts."""
        size = self.rollout.generations
        places = [(prompt, number) for prompt in asked for number in range(size)]
        rows = [self.prompts[prompt] for prompt, _ in places]
        written = self._written(rows, [(self.seed, TRAINING, cycle, *place) for place in places])
        if written is None:
            return None
        found = [
            replace(each, number=prompt * size + number)
            for each, (prompt, number) in zip(self._penalised(written), places, strict=True)
        ]
        return [found[start : start + size] for start in range(0, len(found), size)]

    def _resampled(
        self,
        cycle: int,
        groups: list[list[Rollout]],
        others: Iterator[int],
        replaced: list[Rollout],
    ) -> list[list[Rollout]] | None:
        """The groups, those without variance replaced by the answers to other prompts.

        Appends the answers that are replaced. DAPO, arXiv:2503.14476, equation 11.
        """
        rewards_PG = torch.stack([rewards_tensor(group) for group in groups])
        equal = [at for at, is_equal in enumerate(is_without_variance(rewards_PG)) if is_equal]
        # There may be fewer prompts left than groups to replace.
        chosen = dict(zip(equal, others, strict=False))
        if not chosen:
            return groups
        written = self._groups(cycle, list(chosen.values()))
        if written is None:
            return None
        found = list(groups)
        for at, group in zip(chosen, written, strict=True):
            replaced += [replace(each, fate="replaced") for each in found[at]]
            found[at] = group
        return found

    def validate(self, numbers: Sequence[int], rows: Sequence[PromptRow]) -> list[Rollout] | None:
        """An answer to each validation prompt: the same random draws each time."""
        seeds = [(self.seed, VALIDATION, number) for number in numbers]
        found = self._write_and_score(rows, seeds)
        return None if found is None else self._penalised(found)

    def _written(self, rows: Sequence[PromptRow], seeds: Sequence[Any]) -> list[Rollout] | None:
        """An answer to each prompt; every rank writes its share."""
        mine = range(this_rank(), len(rows), num_ranks())
        found = self._write_and_score([rows[at] for at in mine], [seeds[at] for at in mine])
        parts = gather_over_ranks(found)
        if any(part is None for part in parts):
            return None
        return [parts[at % num_ranks()][at // num_ranks()] for at in range(len(rows))]

    def _write_and_score(
        self, rows: Sequence[PromptRow], seeds: Sequence[Any]
    ) -> list[Rollout] | None:
        asked = [
            AskedPrompt(tuple(row.input_ids), seed) for row, seed in zip(rows, seeds, strict=True)
        ]
        with evaluating(self.model), self.precision():
            answers = self.write(asked)
        if answers is None:
            return None
        scores, totals = self.score(rows, answers)
        return [
            Rollout(
                0,
                answer.ids,
                answer.text,
                answer.num_tokens,
                answer.is_truncated,
                parts,
                total,
            )
            for answer, parts, total in zip(answers, scores, totals, strict=True)
        ]

    def _penalised(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With the penalty of those that were cut off subtracted from their rewards."""
        if self.rollout.truncated != "penalise":
            return rollouts
        return [
            replace(each, reward=each.reward - self.rollout.penalty)
            if each.is_truncated and each.reward is not None
            else each
            for each in rollouts
        ]

    def _measured(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With log-probabilities under model and reference, and values, where they are needed."""
        rows = [self.prompts[each.number // self.rollout.generations] for each in rollouts]
        beta, has_critic = settings_of(self.loss).beta, isinstance(self.loss, PpoLoss)
        needs_old = self.rollout.updates_per_rollout > 1 or (
            isinstance(self.loss, RlooLoss) and beta > 0
        )
        if needs_old or has_critic:
            with evaluating(self.model):
                old, values = self._look_at(self.model, rollouts, rows, values=has_critic)
            rollouts = [replace(each, old=one) for each, one in zip(rollouts, old, strict=True)]
            if has_critic:
                rollouts = [
                    replace(each, values=one) for each, one in zip(rollouts, values, strict=True)
                ]
        if beta > 0:
            with self._reference() as reference:
                known, _ = self._look_at(reference, rollouts, rows)
            rollouts = [
                replace(each, reference=one) for each, one in zip(rollouts, known, strict=True)
            ]
        return rollouts

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.reference is not None:
            attach(self.reference)
            yield self.reference
        else:
            with adapter_off(self.model) as base:
                yield base

    def _look_at(
        self,
        model: Any,
        rollouts: Sequence[Rollout],
        rows: Sequence[PromptRow],
        *,
        values: bool = False,
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probability of each token of every answer, and with `values` what the critic expects.

        Every rank measures its share.
        """
        mine = range(this_rank(), len(rollouts), num_ranks())
        examples = [as_example(rows[at], rollouts[at], is_first_pass=True).example for at in mine]
        found: list[tuple[list[float], list[float]]] = [([], [])] * len(examples)
        request = LogProbRequest(self.rollout.temperature, values)
        with torch.no_grad(), self.precision():
            for places in batches_by_length(
                [len(each.input_ids) for each in examples], self.max_tokens
            ):
                together = collate_with_owners([examples[at] for at in places], self.pad_token_id)
                batch = to_device(together, self.model.device)
                inputs = {name: batch[name] for name in ("input_ids", "labels")}
                measured = measure_log_probs(model, inputs, request)
                log_prob_N, value_N = measured.log_prob_N, measured.value_N
                sizes = batch["num_targets_S"].tolist()
                parts = torch.split(log_prob_N.cpu(), sizes)
                of_critic = torch.split((log_prob_N if value_N is None else value_N).cpu(), sizes)
                for at, part, expected in zip(places, parts, of_critic, strict=True):
                    found[at] = part.tolist(), expected.tolist()
        parts_R = gather_over_ranks(found)
        every = [parts_R[at % num_ranks()][at // num_ranks()] for at in range(len(rollouts))]
        return [one for one, _ in every], [other for _, other in every]

    def _judged(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With advantages, fates, and shares in the loss of an update."""
        masks = self.rollout.truncated == "mask"
        if isinstance(self.loss, PpoLoss):
            fates = [fate_of(each, masks=masks) for each in rollouts]
            return judged_by_critic(rollouts, fates, self.loss)
        settings, generations = settings_of(self.loss), self.rollout.generations
        reward_PG = torch.tensor(
            [self._reward(each) for each in rollouts], dtype=torch.float64
        ).view(-1, generations)
        if isinstance(self.loss, RlooLoss):
            advantage_PG = leave_one_out_advantages(reward_PG)
        else:
            advantage_PG = group_advantages(reward_PG, scale=settings.scale)
        is_equal_S = is_without_variance(reward_PG).repeat_interleave(generations)
        counts_S = torch.tensor(
            [0 if masks and each.is_truncated else len(each.ids) for each in rollouts]
        )
        share_S = shares(counts_S, settings.normalize, max_length=self.rollout.max_new_tokens)
        is_held = settings.beta > 0 and not isinstance(self.loss, RlooLoss)
        found = []
        for each, advantage, share, is_equal in zip(
            rollouts,
            advantage_PG.flatten().tolist(),
            share_S.tolist(),
            is_equal_S.tolist(),
            strict=True,
        ):
            fate = fate_of(each, masks=masks, is_equal=is_equal)
            # Without a KL in the loss, an advantage of zero is a gradient of zero.
            is_learned = fate != "masked" and (is_held or advantage != 0)
            more = {"advantage": advantage, "share": share, "fate": fate, "is_learned": is_learned}
            found.append(replace(each, **more))
        return found

    def _reward(self, rollout: Rollout) -> float:
        """What the group compares; NaN without a reward. RLOO's has the KL in it."""
        if rollout.reward is None:
            return math.nan
        if not isinstance(self.loss, RlooLoss) or not self.loss.beta:
            return rollout.reward
        assert rollout.old is not None and rollout.reference is not None
        return rollout.reward - self.loss.beta * (sum(rollout.old) - sum(rollout.reference))


def fate_of(rollout: Rollout, *, masks: bool, is_equal: bool = False) -> str:
    """What becomes of an answer; see `Rollout.fate`."""
    if masks and rollout.is_truncated:
        return "masked"
    if rollout.reward is None:
        return "unrated"
    return "equal" if is_equal else "learned"


def rewards_tensor(rollouts: Sequence[Rollout]) -> Tensor:
    """The rewards of some answers, NaN where there is none, shape [S], float64."""
    rewards = [math.nan if each.reward is None else each.reward for each in rollouts]
    return torch.tensor(rewards, dtype=torch.float64)


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
