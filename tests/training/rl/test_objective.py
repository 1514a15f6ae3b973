"""Learning from rewards: the gradient of the slow way, whatever an update is cut into."""

import json
import math

import pytest
import torch

from tests.training.conftest import relative_difference, weights_of
from tests.training.preference.conftest import with_lora
from tests.training.rl.conftest import LOSSES, score_by_ids
from yrunner.data.batching.collate import all_in_one_row, one_per_row
from yrunner.losses.policy import group_advantages, leave_one_out_advantages
from yrunner.models.load import find_stop_ids
from yrunner.training.metrics import read_metrics
from yrunner.training.rl.collect import settings_of

SPLITS = [(16, 1), (4, 4), (1, 16)]


def slow_log_probs(model, prompt, ids, temperature):
    """Of each token of an answer: no padding, all logits, a look-up."""
    start = len(prompt.input_ids)
    logits_TV = model(torch.tensor([[*prompt.input_ids, *ids]])).logits[0, start - 1 : -1]
    log_TV = (logits_TV.double() / temperature).log_softmax(-1)
    return log_TV[range(len(ids)), ids]


def slow_loss(model, reference, trainer, rollouts, temperature):
    """The loss of the first update, by loops over answers."""
    loss = trainer.batches.loss
    settings, generations = settings_of(loss), trainer.plan.generations
    is_rloo = loss.kind == "rloo"
    rewards, new, old = [], [], []
    for each in rollouts:
        prompt = trainer.batches.train.prompt(each.number)
        with torch.no_grad():
            of_reference = slow_log_probs(reference, prompt, each.ids, temperature)
        of_model = slow_log_probs(model, prompt, each.ids, temperature)
        new.append(of_model)
        old.append(of_reference)
        reward = math.nan if each.reward is None else each.reward
        if is_rloo:
            reward -= loss.beta * float((of_model - of_reference).sum().detach())
        rewards.append(reward)
    reward_PG = torch.tensor(rewards, dtype=torch.float64).view(-1, generations)
    if is_rloo:
        advantages = leave_one_out_advantages(reward_PG).flatten()
    else:
        advantages = group_advantages(reward_PG, scale=settings.scale).flatten()
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(each.ids) for each in rollouts)
    for log_prob_N, reference_N, advantage in zip(new, old, advantages, strict=True):
        if is_rloo:
            total = total - advantage * (log_prob_N.sum() - log_prob_N.sum().detach()).exp()
            continue
        change_N = log_prob_N - log_prob_N.detach()
        if settings.ratio == "sequence":
            change_N = change_N.mean().expand(len(change_N))
        difference_N = reference_N - log_prob_N
        kl_N = difference_N.exp() - difference_N - 1
        loss_N = -advantage * change_N.exp() + settings.beta * kl_N
        match settings.normalize:
            case "sequence":
                total = total + loss_N.mean()
            case "tokens":
                total = total + loss_N.sum() / num_tokens * len(rollouts)
            case "length":
                total = total + loss_N.sum() / trainer.batches.collector.rollout.max_new_tokens
    return total / len(rollouts)


@pytest.mark.parametrize(
    ("loss", "temperature"), [*((name, 1.0) for name in LOSSES), ("grpo", 0.7), ("rloo", 0.7)]
)
def test_the_gradient_of_an_update_is_that_of_the_slow_way(
    make_talker, prompts, make_trainer, loss, temperature
):
    reference = make_talker(seed=3)
    trainer = make_trainer(
        make_talker(),
        prompts,
        loss=loss,
        reference=reference,
        rollout={"temperature": temperature},
        batch_size=3,
        gradient_accumulation_steps=8,
        max_grad_norm=0,
        max_steps=1,
    )
    # 24 answers, six groups, split over micro-batches of three.
    slow = make_talker()
    gradients = {}

    def keep_gradients(*_, **__):
        gradients.update(
            {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}
        )
        return clip()

    clip = trainer._clip_and_judge
    trainer._clip_and_judge = keep_gradients
    trainer.train()
    rollouts = trainer.batches.buffer.rollouts
    assert len(rollouts) == 24 and any(each.advantage for each in rollouts)
    expected = slow_loss(slow, reference, trainer, rollouts, temperature)
    (record,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert record["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert record["policy_change"] == 0 and record["clipped"] == 0, "the ratio is 1 exactly"
    expected.backward()
    for name, weight in slow.named_parameters():
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    ("loss", "passes"), [*((name, 1) for name in LOSSES), ("grpo", 2), ("rloo", 2)]
)
def test_accumulation_changes_nothing(make_talker, prompts, make_trainer, loss, passes):
    """A group may be split over micro-batches, or share a row; the last cycle is short."""
    ends = []
    for number, (size, steps) in enumerate(SPLITS):
        model = with_lora(make_talker(), trained=True)
        trainer = make_trainer(
            model,
            prompts[:6],
            loss=loss,
            folder=f"run{number}",
            rollout={"updates_per_rollout": passes, "batch_size": 2 + number},
            batch_size=size,
            gradient_accumulation_steps=steps,
            layout=all_in_one_row if steps == 4 else one_per_row,
            learning_rate=1e-3,
        )
        assert trainer.plan.num_updates == 2 * passes
        trainer.train()
        ends.append(model)
    start = with_lora(make_talker(), trained=True)
    assert relative_difference(ends[0], start) > 1e-4
    for other in ends[1:]:
        assert relative_difference(ends[0], other) < 1e-5


def test_groups_of_equal_rewards_teach_nothing_and_are_counted(make_talker, prompts, make_trainer):
    def all_alike(rows, answers):
        return [[0.1, None]] * len(answers), [0.1] * len(answers)

    model = make_talker()
    before = weights_of(model)
    trainer = make_trainer(model, prompts, loss="dapo", score=all_alike, batch_size=16)
    trainer.train()
    assert torch.equal(weights_of(model), before)
    rows = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert all(row["equal_groups"] == 1 and row["learned"] == 0 for row in rows)
    assert all(row["loss"] == 0 and row["grad_norm"] == 0 for row in rows)
    lines = trainer.run_dir.rollouts.read_text("utf-8").splitlines()
    assert {json.loads(line)["fate"] for line in lines} == {"equal"}


def test_an_answer_without_a_reward_leaves_the_mean_of_its_group(
    make_talker, prompts, make_trainer
):
    def every_third_unknown(rows, answers):
        parts = score_by_ids(rows, answers)[0]
        totals = [None if at % 3 == 0 else part[0] for at, part in enumerate(parts)]
        return parts, totals

    trainer = make_trainer(
        make_talker(),
        prompts,
        loss="dr_grpo",
        score=every_third_unknown,
        batch_size=32,
        max_steps=1,
    )
    trainer.train()
    rollouts = trainer.batches.buffer.rollouts
    unknown = [each for each in rollouts if each.reward is None]
    assert len(unknown) == 11 and all(each.fate == "unrated" for each in unknown)
    assert not any(each.is_learned or each.advantage for each in unknown)
    for start in range(0, 32, 4):
        group = [each for each in rollouts[start : start + 4] if each.reward is not None]
        mean = sum(each.reward for each in group) / len(group)
        for each in group:
            assert each.advantage == pytest.approx(each.reward - mean)


@pytest.mark.parametrize("truncated", ["mask", "penalise", "keep"])
def test_answers_that_are_cut_off(
    make_talker, prompts, make_trainer, capitals_tokenizer, truncated
):
    model = make_talker()
    # The ends of an answer become likely now and then.
    model.lm_head.weight.data[find_stop_ids(capitals_tokenizer)] *= 3
    trainer = make_trainer(
        model,
        prompts,
        loss="dapo",
        rollout={"truncated": truncated, "penalty": 0.25},
        batch_size=32,
        max_steps=1,
    )
    trainer.train()
    rollouts = trainer.batches.buffer.rollouts
    cut = [each for each in rollouts if each.is_truncated]
    assert cut and len(cut) < len(rollouts)
    for each in rollouts:
        whole = sum(score or 0.0 for score in each.scores)
        penalty = 0.25 if truncated == "penalise" and each.is_truncated else 0.0
        assert each.reward == pytest.approx(whole - penalty)
    assert all((each.fate == "masked") == (truncated == "mask") for each in cut)
    (row,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    learned = [each for each in rollouts if each.is_learned]
    assert row["targets"] == sum(len(each.ids) for each in learned)
    if truncated == "mask":
        assert not any(each.is_truncated for each in learned)
        tokens = sum(len(each.ids) for each in rollouts if not each.is_truncated)
        assert learned[0].share == pytest.approx(1 / tokens)


def test_the_same_answers_are_drawn_in_any_batch(make_talker, prompts, make_trainer):
    texts = []
    for size in (1, 7, 64):
        trainer = make_trainer(
            make_talker(),
            prompts,
            loss="dapo",
            folder=f"run{size}",
            rollout={"batch_size": size, "temperature": 0.8},
            batch_size=32,
            max_steps=1,
        )
        trainer.train()
        texts.append([each.ids for each in trainer.batches.buffer.rollouts])
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(ids) for ids in texts[0]}) > 20, "the answers of a group differ"


def test_answers_of_a_later_pass_are_compared_with_the_model_that_drew_them(
    make_talker, prompts, make_trainer
):
    trainer = make_trainer(
        make_talker(),
        prompts,
        loss="dapo",
        rollout={"updates_per_rollout": 3},
        batch_size=32,
        max_steps=3,
        learning_rate=1e-2,
    )
    trainer.train()
    rows = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    changes = [row["policy_change"] for row in rows]
    assert changes[0] == 0 < changes[1] < changes[2]
    assert rows[0]["clipped"] == 0 < rows[2]["clipped"]
    assert len({row["reward"] for row in rows}) == 1, "no new answers"
