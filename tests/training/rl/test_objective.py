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
from yrunner.losses.score_head import add_critic
from yrunner.models.load import find_stop_ids
from yrunner.training.metrics import read_metrics
from yrunner.training.rl.collect import settings_of

SPLITS = [(16, 1), (4, 4), (1, 16)]
SGD = dict(optimizer="sgd", learning_rate=1.0, max_grad_norm=0.0)


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
    ("loss", "temperature"),
    [*((name, 1.0) for name in LOSSES if name != "ppo"), ("grpo", 0.7), ("rloo", 0.7)],
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
    ("loss", "passes"), [*((name, 1) for name in LOSSES), ("grpo", 2), ("rloo", 2), ("ppo", 2)]
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
    if loss == "ppo":
        torch.manual_seed(6)
        add_critic(start)
    assert relative_difference(ends[0], start) > 1e-4
    for other in ends[1:]:
        assert relative_difference(ends[0], other) < 1e-5


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_an_update_learns_whole_groups_and_is_held_at_the_kept_rows(
    make_talker, prompts, examples, make_trainer, loss
):
    """Cut up in any way; its gradient is that of the answers plus that of the kept rows."""
    gradients, records, kept = [], [], None
    for number, (kept_rows, size, steps) in enumerate(
        [(True, 16, 1), (True, 4, 4), (True, 1, 16), (False, 4, 3)]
    ):
        trainer = make_trainer(
            with_lora(make_talker(), trained=True),
            prompts,
            loss=loss,
            folder=f"run{number}",
            kept_rows=examples[20:26] if kept_rows else None,
            batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            **SGD,
        )
        assert trainer.plan.lanes == 12
        before = weights_of(trainer.model)
        kept = kept if trainer.objective.regulariser is None else trainer.objective.regulariser
        trainer.train()
        gradients.append(before - weights_of(trainer.model))
        records += [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    whole, *others, alone = gradients
    for other in others:
        assert (other - whole).norm() < 1e-5 * whole.norm()
    held = with_lora(make_talker(), trained=True)
    chosen = [examples[20 + row] for (row,) in kept.plan.rows(0)]
    divergence = torch.cat([slow_divergences(held, example) for example in chosen]).mean()
    before = weights_of(held)
    (kept.strength * divergence).backward()
    with torch.no_grad():
        for weight in held.parameters():
            if weight.grad is not None:
                weight -= weight.grad
    of_kept = before - weights_of(held)
    assert of_kept.norm() > 0.01 * whole.norm()
    assert (whole - alone - of_kept).norm() < 1e-4 * whole.norm()
    assert all(row["answers"] == 12 for row in records)
    for row in records[:3]:
        assert row["keep_divergence"] == pytest.approx(divergence.item(), rel=1e-4)
    assert "keep_divergence" not in records[3]


def slow_divergences(model, example):
    """KL(base || model) at each target, from all logits; the base is the model, adapter off."""
    places = [place - 1 for place in example.target_positions]
    ids = torch.tensor([example.input_ids])
    with torch.no_grad(), model.disable_adapter():
        log_base = model(ids).logits[0, places].log_softmax(-1)
    return (log_base.exp() * (log_base - model(ids).logits[0, places].log_softmax(-1))).sum(-1)


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


def test_groups_of_equal_rewards_are_replaced_by_the_answers_to_other_prompts(
    make_talker, prompts, make_trainer
):
    """In rounds, until there is variance, no round or no prompt is left; all is counted."""
    tried = []

    def alike_for_four_prompts(rows, answers):
        tried.extend(row.origin.row for row in rows[::4])
        totals = [
            0.5 if row.origin.row <= 4 else float(at % 2)
            for at, (row, _) in enumerate(zip(rows, answers, strict=True))
        ]
        return [[total, None] for total in totals], list(totals)

    found = {}
    for rounds in (0, 1, 7):
        tried.clear()
        trainer = make_trainer(
            make_talker(),
            prompts,
            loss="dapo",
            folder=f"run{rounds}",
            score=alike_for_four_prompts,
            rollout={"resample": rounds},
            batch_size=16,
            max_steps=1,
            order="as_written",
        )
        trainer.train()
        (row,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
        found[rounds] = row
        lines = [json.loads(line) for line in trainer.run_dir.rollouts.read_text().splitlines()]
        replaced = [line for line in lines if line["fate"] == "replaced"]
        assert len(lines) == 4 * len(tried) and len(set(tried)) == len(tried), "each once"
        assert len(replaced) == len(lines) - 16
        assert all(line["row"] <= 4 for line in replaced)
        assert len(trainer.batches.buffer.rollouts) == 16, "an update has its whole size"
        if rounds:
            assert row["replaced_groups"] == len(replaced) / 4
    assert "replaced_groups" not in found[0] and found[0]["equal_groups"] == 1
    assert found[1]["replaced_groups"] == 4 and found[1]["equal_groups"] == 0
    assert found[7]["replaced_groups"] == 4, "four other prompts sufficed"


def test_where_no_other_prompt_is_left_equal_groups_stay(make_talker, prompts, make_trainer):
    def all_alike(rows, answers):
        return [[0.1, None]] * len(answers), [0.1] * len(answers)

    trainer = make_trainer(
        make_talker(),
        prompts[:6],
        loss="dapo",
        score=all_alike,
        rollout={"resample": 5},
        batch_size=16,
        max_steps=1,
    )
    trainer.train()
    (row,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert row["replaced_groups"] == 2 and row["equal_groups"] == 1 and row["loss"] == 0


def test_a_few_answers_of_each_update_are_kept_with_the_ratios_that_it_learned_with(
    make_talker, prompts, make_trainer
):
    trainer = make_trainer(
        make_talker(),
        prompts,
        loss="dapo",
        rollout={"updates_per_rollout": 2},
        batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=2,
        learning_rate=1e-2,
    )
    trainer.train()
    buffer, settings = trainer.batches.buffer, settings_of(trainer.batches.loss)
    first = make_talker()
    file = trainer.run_dir.rollout_tokens
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [line["step"] for line in found] == [1] * 4 + [2] * 4
    assert any(line["clipped"] for line in found if line["step"] == 2)
    for line in found:
        number = (line["row"] - 1) * 4 + line["generation"]
        rollout = buffer.by_number[number]
        assert line["cycle"] == 0 and line["ids"] == rollout.ids and rollout.is_learned
        drawn = slow_log_probs(first, trainer.batches.train.prompt(number), rollout.ids, 1.0)
        if line["step"] == 1:
            assert set(line["ratio"]) == {1.0} and not line["clipped"]
            assert line["log_prob"] == pytest.approx(drawn.tolist(), rel=1e-3, abs=1e-5)
        for place, ratio in enumerate(line["ratio"]):
            change = line["log_prob"][place] - drawn[place].item()
            assert ratio == pytest.approx(math.exp(change), rel=1e-2), "four digits of a logarithm"
            up, down = ratio > 1 + settings.clip_high, ratio < 1 - settings.clip_low
            is_clipped = up if rollout.advantage > 0 else down
            assert (place in line["clipped"]) == is_clipped
