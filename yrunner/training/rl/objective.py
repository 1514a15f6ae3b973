"""Learning from rewards: GRPO, its variants, RLOO and PPO, over the answers of a cycle."""

# Shapes: S = answers of a micro-batch, N = their targets

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yrunner.data.batching.answers import model_inputs
from yrunner.data.batching.batches import Batch
from yrunner.distributed.collectives import sum_over_ranks, this_rank
from yrunner.losses.log_probs import LogProbRequest, measure_log_probs
from yrunner.losses.policy import (
    Ratio,
    clipped_surrogate,
    clipped_value_loss,
    k3_divergence,
    log_ratios,
)
from yrunner.recipe.schema.recipe import PolicyLoss, Spikes
from yrunner.recipe.schema.rl import PpoLoss, RlooLoss
from yrunner.training.metrics import SignalMeter
from yrunner.training.objective import Objective
from yrunner.training.rl.batches import RolloutBuffer
from yrunner.training.rl.collect import settings_of
from yrunner.training.rl.figures import RolloutFigures
from yrunner.training.rl.token_samples import TokenSamples
from yrunner.training.rng_snapshot import Stateful
from yrunner.training.spike_guard import SpikeGuard


class PolicyObjective(Objective):
    """The loss of the answers that an update learns from; each brings its part in the whole."""

    def __init__(
        self,
        loss: PolicyLoss,
        spikes: Spikes,
        buffer: RolloutBuffer,
        rewards: Sequence[str],
        *,
        generations: int,
        temperature: float,
        resamples: bool = False,
    ) -> None:
        """`rewards`: their names. `temperature`: that of the rollouts.

        `resamples`: whether groups without variance are replaced.
        """
        self.settings = settings_of(loss)
        self.critic = loss if isinstance(loss, PpoLoss) else None
        # RLOO and PPO have the KL in their rewards.
        self.beta = 0.0 if isinstance(loss, RlooLoss | PpoLoss) else self.settings.beta
        self.ratio: Ratio = "token" if self.settings.ratio == "token" else "mean"
        if isinstance(loss, RlooLoss):
            self.ratio = "answer"
        self.buffer = buffer
        self.samples: TokenSamples | None = None
        """Keeps a few answers token by token."""
        self.request = LogProbRequest(temperature, values=self.critic is not None)
        self.records = RolloutFigures(
            rewards,
            generations=generations,
            has_reference=self.settings.beta > 0 and not isinstance(loss, RlooLoss),
            resamples=resamples,
            has_critic=self.critic is not None,
        )
        figures = self.records.figures
        super().__init__(SpikeGuard(spikes, figures), SignalMeter(figures))

    @property
    def sums(self) -> dict[str, Stateful]:
        """With the answers that are learned from."""
        return super().sums | {"rollouts": self.buffer}

    def begin_update(self, model: Any, batches: Sequence[Batch], device: torch.device) -> None:
        """Start the clock, and count the answers."""
        self.meter.start()
        if self.samples is not None:
            self.samples.begin(batches)
        sums: dict[str, float | Tensor] = {}
        # Every rank holds all of them.
        if this_rank() == 0 and self.buffer.rollouts:
            sums = self.records.sums_of_answers(
                self.buffer.rollouts, self.buffer.seconds, self.buffer.num_replaced
            )
        self._add(self.records.record(sums, device))

    def loss(self, model: Any, called: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        total, record_R = self._measure(called, batch, self.samples)
        self._add(record_R)
        return total.float()

    def alone(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The part of a batch in the loss of its update."""
        total, _ = self._measure(model, batch)
        return total, float(total)

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean reward of an answer to each prompt; `eval_loss` is minus it."""
        sums_5 = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            reward_S = batch["reward_S"].cpu()
            parts = (
                reward_S.nansum(),
                (~reward_S.isnan()).sum(),
                batch["num_tokens_S"].sum(),
                batch["is_truncated_S"].sum(),
                len(reward_S),
            )
            sums_5 += torch.tensor([float(part) for part in parts], dtype=torch.float64)
        total = sum_over_ranks(sums_5.to(next(model.parameters()).device))
        reward, rated, tokens, truncated, answers = total.tolist()
        mean = reward / max(rated, 1)
        return {
            "eval_loss": -mean,
            "eval_reward": mean,
            "eval_answer_tokens": tokens / max(answers, 1),
            "eval_truncated": truncated / max(answers, 1),
        }

    def _measure(
        self, called: Any, batch: Batch, samples: TokenSamples | None = None
    ) -> tuple[Tensor, Tensor]:
        """The part of a micro-batch in the loss of its update, float64, and its record."""
        found = measure_log_probs(called, model_inputs(batch), self.request)
        log_prob_N, answer_N = found.log_prob_N.double(), batch["answer_N"]
        # Drawn by this very model: its own log-probabilities, so that the ratio is 1 exactly.
        old_N = batch.get("old_N", log_prob_N.detach())
        log_ratio_N = log_ratios(log_prob_N, old_N, answer_N, batch["num_targets_S"], self.ratio)
        loss_N, is_clipped_N = clipped_surrogate(
            log_ratio_N,
            batch.get("advantages_N", batch["advantage_S"][answer_N]),
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
        )
        if samples is not None:
            samples.add(batch, log_prob_N, log_ratio_N, is_clipped_N)
        sums: dict[str, float | Tensor] = {}
        if self.records.has_reference and "reference_N" in batch:
            kl_N = k3_divergence(log_prob_N, batch["reference_N"])
            loss_N = loss_N + self.beta * kl_N
            sums["kl"] = kl_N.detach().sum()
        share_N = batch["share_S"][answer_N]
        total = (share_N * loss_N).sum()
        if self.critic is not None:
            assert found.value_N is not None
            sums["policy_loss"] = total.detach()
            total, more = self._with_values(total, found.value_N.double(), share_N, batch)
            sums |= more
        sums |= {
            "loss": total.detach(),
            "targets": len(loss_N),
            "clipped": is_clipped_N.sum(),
            "entropy": found.entropy_N.double().sum(),
            "change": k3_divergence(old_N, log_prob_N.detach()).sum(),
        }
        return total, self.records.record(sums, total.device)

    def _with_values(
        self, total: Tensor, value_N: Tensor, share_N: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss and the critic's, and the figures of this."""
        assert self.critic is not None
        # A micro-batch without answers has none.
        known = (batch.get(name, value_N.detach()) for name in ("values_N", "returns_N"))
        loss_N, is_clipped_N = clipped_value_loss(value_N, *known, clip=self.critic.clip_value)
        value_loss = (share_N * loss_N).sum()
        figures = {"value_loss": value_loss.detach(), "value_clipped": is_clipped_N.sum()}
        return total + self.critic.value_coef * value_loss, figures

    def _add(self, record_R: Tensor) -> None:
        self.meter.add(record_R)
        self.guard.add(record_R)
