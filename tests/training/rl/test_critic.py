"""PPO: the critic's values, what is learned from them, and what a critic may not change."""

import json
from dataclasses import replace

import pytest
import torch

from tests.training.conftest import weights_of
from tests.training.preference.conftest import with_lora
from tests.training.rl.conftest import LOSSES
from tests.training.rl.test_objective import slow_log_probs
from yrunner.losses.score_head import CRITIC, adapter_active, critic_weights, same_weights_trained
from yrunner.training.metrics import read_metrics
from yrunner.training.rl.collect import judged_by_critic

ONE_UPDATE = dict(batch_size=3, gradient_accumulation_steps=8, max_grad_norm=0, max_steps=1)


def slow_values(model, prompt, ids):
    """Before each token of an answer: no padding, the adapter switched by hand."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    start = len(prompt.input_ids)
    with adapter_active(causal, CRITIC):
        hidden_TD = causal.model(torch.tensor([[*prompt.input_ids, *ids]])).last_hidden_state[0]
    return (hidden_TD[start - 1 : -1] @ causal.critic.weight[0]).double()


def with_a_critic_that_says_something(model):
    """At the start its values are all 0, which would hide much."""
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in critic_weights(model).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=chance))
    return model


def slow_update(model, trainer, rollouts):
    """The loss of the first update of PPO, by loops over answers and tokens, in float64."""
    loss = trainer.batches.loss
    parts, every_advantage = [], []
    for each in rollouts:
        prompt = trainer.batches.train.prompt(each.number)
        log_prob_T = slow_log_probs(model, prompt, each.ids, 1.0)
        value_T = slow_values(model, prompt, each.ids)
        with same_weights_trained(model), torch.no_grad(), model.disable_adapter():
            reference_T = slow_log_probs(model, prompt, each.ids, 1.0)
        rewards = (-loss.beta * (log_prob_T - reference_T)).tolist()
        rewards[-1] += each.reward
        values = [*value_T.tolist(), 0.0]
        advantages, following = [], 0.0
        for at in reversed(range(len(rewards))):
            surprise = rewards[at] + loss.gamma * values[at + 1] - values[at]
            following = surprise + loss.gamma * loss.lam * following
            advantages.insert(0, following)
        returns = [one + other for one, other in zip(advantages, values[:-1], strict=True)]
        every_advantage += advantages
        parts.append((log_prob_T, value_T, advantages, returns))
    mean = sum(every_advantage) / len(every_advantage)
    variance = sum((one - mean) ** 2 for one in every_advantage) / len(every_advantage)
    policy = value = torch.zeros((), dtype=torch.float64)
    for log_prob_T, value_T, advantages, returns in parts:
        for at, advantage in enumerate(advantages):
            white = (advantage - mean) / (variance + 1e-8) ** 0.5
            policy = policy - (log_prob_T[at] - log_prob_T[at].detach()).exp() * white
            value = value + (value_T[at] - returns[at]) ** 2 / 2
    tokens = len(every_advantage)
    return policy / tokens, value / tokens, loss.value_coef


def test_policy_and_critic_get_the_gradients_of_the_slow_way(make_talker, prompts, make_trainer):
    model = with_lora(make_talker(), trained=True)
    trainer = make_trainer(model, prompts, loss="ppo", **ONE_UPDATE)
    with_a_critic_that_says_something(model)
    gradients = {}

    def keep_gradients(*_, **__):
        named = trainer.model.named_parameters()
        gradients.update({name: it.grad.clone() for name, it in named if it.requires_grad})
        return clip()

    def do_not_move(*_, **__):
        pass

    clip = trainer._clip_and_judge
    trainer._clip_and_judge = keep_gradients
    trainer.before_training.append(lambda: setattr(trainer.optimizer, "step", do_not_move))
    trainer.train()
    rollouts = trainer.batches.buffer.rollouts
    assert len(rollouts) == 24
    model.eval()
    policy, value, coefficient = slow_update(model, trainer, rollouts)
    (record,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert record["policy_loss"] == pytest.approx(policy.item(), abs=1e-6)
    assert record["value_loss"] == pytest.approx(value.item(), rel=1e-5)
    assert record["loss"] == pytest.approx((policy + coefficient * value).item(), abs=1e-5)
    assert record["policy_change"] == 0 and record["clipped"] == 0, "the ratio is 1 exactly"
    model.zero_grad()
    policy, value, coefficient = slow_update(model, trainer, rollouts)
    (policy + coefficient * value).backward()
    trained = {name: it for name, it in model.named_parameters() if it.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=2e-6)
    assert all(gradients[name].abs().max() > 0 for name in critic_weights(model))


def test_recomputed_layers_have_the_adapter_that_they_had(make_talker, prompts, make_trainer):
    """Recomputing happens in the backward pass, when another adapter is active."""
    ends = []
    for recomputes in (False, True):
        model = with_lora(make_talker(), trained=True)
        trainer = make_trainer(
            model,
            prompts,
            loss="ppo",
            folder=f"run{recomputes}",
            gradient_checkpointing=recomputes,
            **{**ONE_UPDATE, "max_grad_norm": 1.0, "max_steps": 2, "learning_rate": 1e-2},
        )
        with_a_critic_that_says_something(model)
        trainer.train()
        ends.append(weights_of(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_off_for_the_reference_and_the_critic_is_trained_on(
    make_talker, prompts, make_trainer
):
    model = with_lora(make_talker(), trained=True)
    settings = dict(batch_size=32, learning_rate=1e-2, epochs=3)
    trainer = make_trainer(model, prompts, loss="ppo", **settings)
    before = {name: it.detach().clone() for name, it in critic_weights(model).items()}
    trainer.train()
    moved = [not torch.equal(before[name], it) for name, it in critic_weights(model).items()]
    assert all(moved) and len(moved) > 10
    rows = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert rows[0]["kl"] > 0, "this adapter is another model than its base"


def test_with_all_weights_trained_the_critic_reads_the_models_own_states(
    make_talker, prompts, make_trainer
):
    model, reference = make_talker(), make_talker(seed=3)
    trainer = make_trainer(
        model,
        prompts,
        loss="ppo",
        reference=reference,
        batch_size=16,
        rollout={"updates_per_rollout": 2, "generations": 1},
        learning_rate=1e-2,
        epochs=6,
    )
    trainer.train()
    assert list(critic_weights(model)) == ["critic.weight"]
    rows = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert all("equal_groups" not in row and row["learned"] == 1 for row in rows)
    assert rows[-1]["value_loss"] < rows[0]["value_loss"], "what to expect can be learned"
    assert rows[0]["value"] == 0 and rows[-1]["value"] != 0
    lines = [json.loads(line) for line in trainer.run_dir.rollouts.read_text().splitlines()]
    rollouts = {each.number: each for each in trainer.batches.buffer.rollouts}
    assert len(lines) == 8 * 6
    for line in lines[-8:]:
        each = rollouts[line["row"] - 1]
        assert line["value"] == pytest.approx(sum(each.values) / len(each.values))
        assert line["advantage"] == pytest.approx(sum(each.advantages) / len(each.advantages))
    trainer.checkpointer.write(folder := trainer.run_dir.folder)
    saved = trainer.run_dir.folder / "model.safetensors"
    assert b"critic" not in saved.read_bytes()[:100_000]
    assert (folder / "critic.safetensors").exists()


def test_equal_rewards_give_no_nan_and_a_critic_learns_them(make_talker, prompts, make_trainer):
    def all_alike(rows, answers):
        return [[0.5, None]] * len(answers), [0.5] * len(answers)

    model = make_talker()
    loss = replace_loss(beta=0.0, lam=1.0)
    trainer = make_trainer(
        model, prompts, loss=loss, score=all_alike, batch_size=32, epochs=3, learning_rate=1e-2
    )
    trainer.train()
    rows = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert rows[0]["policy_loss"] == 0 and rows[0]["value_loss"] == pytest.approx(0.125)
    assert torch.isfinite(weights_of(model)).all()
    assert rows[-1]["value_loss"] < rows[0]["value_loss"]
    assert "explained_variance" not in rows[0], "the returns are all equal"


def replace_loss(**keys):
    """The name of a PPO with other settings."""
    LOSSES["ppo_here"] = LOSSES["ppo"].model_copy(update=keys)
    return "ppo_here"


def test_masked_and_unrated_answers_neither_count_nor_whiten(make_talker, prompts, make_trainer):
    model = with_lora(make_talker())
    trainer = make_trainer(model, prompts, loss="ppo", batch_size=32, max_steps=1)
    trainer.train()
    rollouts = trainer.batches.buffer.rollouts
    loss = LOSSES["ppo"].model_copy(update={"beta": 0.0})
    unknown = [replace(each, reward=None) if at % 2 else each for at, each in enumerate(rollouts)]
    fates = ["unrated" if at % 2 else "learned" for at in range(len(rollouts))]
    judged = judged_by_critic(unknown, fates, loss)
    alone = judged_by_critic(rollouts[::2], fates[::2], loss)
    assert [each.advantages for each in judged[::2]] == [each.advantages for each in alone]
    assert {each.share for each in judged[::2]} == {each.share for each in alone}
    assert not any(each.is_learned for each in judged[1::2])
    white = torch.tensor([one for each in alone for one in each.advantages])
    assert white.mean().abs() < 1e-6 and white.var(correction=0).item() == pytest.approx(1, 1e-5)
    tokens = sum(len(each.ids) for each in alone)
    assert alone[0].share == pytest.approx(1 / tokens)


def test_nothing_to_learn_from_is_no_fault(make_talker, prompts, make_trainer):
    trainer = make_trainer(
        with_lora(make_talker()),
        prompts,
        loss="ppo",
        rollout={"truncated": "mask", "max_new_tokens": 1},
        batch_size=32,
        max_steps=1,
    )
    trainer.train()
    (row,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert row["truncated"] > 0.9 and row["learned"] < 0.1 and row["grad_norm"] == row["grad_norm"]
