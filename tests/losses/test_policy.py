"""Policy gradients by value, by loops in float64, and against TRL where it has the same."""

import math
from collections import defaultdict
from inspect import unwrap
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch

from yrunner.losses.policy import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    group_advantages,
    is_without_variance,
    k3_divergence,
    leave_one_out_advantages,
    log_ratios,
    shares,
    whiten,
)

NAN = math.nan
REWARDS = torch.tensor(
    [[1.0, 0.0, 0.0, 0.5], [0.2, 0.9, 0.1, NAN], [0.7, NAN, NAN, 0.1]], dtype=torch.float64
)


def rated(group):
    return [reward for reward in group.tolist() if not math.isnan(reward)]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_an_advantage_is_the_distance_from_the_mean_of_its_group(scale):
    found = group_advantages(REWARDS, scale=scale)
    for group, advantages in zip(REWARDS, found, strict=True):
        known = rated(group)
        mean = sum(known) / len(known)
        divisor = stdev(known) + 1e-4 if scale == "group" else 1.0
        expected = [0.0 if math.isnan(r) else (r - mean) / divisor for r in group.tolist()]
        assert advantages.tolist() == pytest.approx(expected, rel=1e-12)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    found = leave_one_out_advantages(REWARDS)
    for group, advantages in zip(REWARDS, found, strict=True):
        for place, reward in enumerate(group.tolist()):
            others = rated(torch.cat([group[:place], group[place + 1 :]]))
            missing = math.isnan(reward)
            expected = 0.0 if missing else reward - sum(others) / len(others)
            assert advantages[place].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "group", [[0.1] * 3, [1 / 3, 1 / 3, NAN], [NAN, 0.3, NAN], [NAN] * 3, [-1e9] * 3]
)
def test_a_group_without_variance_has_advantages_of_exactly_zero(group):
    """The mean of three times 0.1 is not 0.1: rounding over a deviation of 0 must not count."""
    reward_PG = torch.tensor([group, [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert is_without_variance(reward_PG).tolist() == [True, False]
    for scale in ("group", "none"):
        found = group_advantages(reward_PG, scale=scale)
        assert found[0].tolist() == [0, 0, 0] and found[1].abs().min() > 0
    found = leave_one_out_advantages(reward_PG)
    assert found[0].tolist() == [0, 0, 0] and found[1].abs().min() > 0


def answers(seed, lengths=(3, 1, 5, 2)):
    """Log-probabilities of answers of these lengths, and which answer each is of."""
    chance = torch.Generator().manual_seed(seed)
    values_N = -2 * torch.rand(sum(lengths), generator=chance, dtype=torch.float64)
    counts_S = torch.tensor(lengths)
    return values_N, torch.arange(len(lengths)).repeat_interleave(counts_S), counts_S


def test_a_ratio_is_of_a_token_or_of_its_answer():
    (new_N, answer_N, counts_S), (old_N, _, _) = answers(0), answers(1)
    found = {
        name: log_ratios(new_N, old_N, answer_N, counts_S, name)
        for name in ("token", "mean", "answer")
    }
    torch.testing.assert_close(found["token"], new_N - old_N)
    for answer, count in enumerate(counts_S.tolist()):
        is_its_N = answer_N == answer
        change = (new_N - old_N)[is_its_N].sum()
        assert (found["answer"][is_its_N] == found["answer"][is_its_N][0]).all()
        torch.testing.assert_close(found["answer"][is_its_N][0], change)
        torch.testing.assert_close(found["mean"][is_its_N][0], change / count)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.1, 2.0, -2.2, False, -2.2),
        (1.5, 2.0, -2.56, True, 0.0),
        (1.5, -2.0, 3.0, False, 3.0),
        (0.5, 2.0, -1.0, False, -1.0),
        (0.5, -2.0, 1.6, True, 0.0),
        (0.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_the_surrogate_by_value(ratio, advantage, loss, clipped, slope):
    log_ratio_N = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    advantage_N = torch.tensor([advantage], dtype=torch.float64)
    loss_N, is_clipped_N = clipped_surrogate(log_ratio_N, advantage_N, clip_low=0.2, clip_high=0.28)
    assert loss_N.item() == pytest.approx(loss) and is_clipped_N.item() is clipped
    loss_N.sum().backward()
    assert log_ratio_N.grad.item() == pytest.approx(slope)


def test_the_divergence_is_zero_where_both_agree_and_positive_elsewhere():
    (new_N, *_), (reference_N, *_) = answers(0), answers(1)
    assert not k3_divergence(new_N, new_N).any()
    found = k3_divergence(new_N, reference_N)
    difference_N = reference_N - new_N
    torch.testing.assert_close(found, torch.expm1(difference_N) - difference_N)
    assert (found > 0).all()


def test_the_mean_of_the_divergence_over_samples_is_the_divergence():
    policy_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference_V = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    expected = (policy_V * (policy_V / reference_V).log()).sum()
    mean = (policy_V * k3_divergence(policy_V.log(), reference_V.log())).sum()
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "normalize"),
    [("grpo", "sequence"), ("dr_grpo", "length"), ("dapo", "tokens")],
)
def test_the_losses_are_those_of_grpo_in_trl(loss_type, normalize, beta, level):
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="an oracle alone")
    advantage_S = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)
    (new_N, answer_N, counts_S), (old_N, *_), (reference_N, *_) = answers(0), answers(1), answers(2)
    new_N.requires_grad_()
    mask_ST = torch.arange(8) < counts_S[:, None]

    def padded(value_N):
        return torch.zeros(4, 8, dtype=torch.float64).masked_scatter(mask_ST, value_N)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            padded(new_N),
            torch.zeros(4, 8),
            None,
        ),
        accelerator=SimpleNamespace(
            gather=lambda each: each, reduce=lambda each, **_: each, num_processes=1
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        max_completion_length=8,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 8, dtype=torch.long),
        "completion_mask": mask_ST.double(),
        "advantages": advantage_S,
        "old_per_token_logps": padded(old_N),
        "ref_per_token_logps": padded(reference_N),
        "num_items_in_batch": counts_S.sum(),
    }
    theirs = unwrap(trainer_module.GRPOTrainer._compute_loss)(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, new_N)

    ratio = "mean" if level == "sequence" else "token"
    log_ratio_N = log_ratios(new_N, old_N, answer_N, counts_S, ratio)
    loss_N, is_clipped_N = clipped_surrogate(
        log_ratio_N, advantage_S[answer_N], clip_low=0.2, clip_high=0.28
    )
    loss_N = loss_N + beta * k3_divergence(new_N, reference_N)
    share_S = shares(counts_S, normalize, max_length=8)
    ours = (share_S[answer_N] * loss_N).sum()
    assert is_clipped_N.any() and not is_clipped_N.all()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, new_N)[0], their_gradient)


def test_the_loss_is_that_of_rloo_in_trl():
    trainer_module = pytest.importorskip("trl.trainer.rloo_trainer", reason="an oracle alone")
    advantage_S = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)
    (new_N, answer_N, counts_S), (old_N, *_) = answers(0), answers(3)
    new_N.requires_grad_()
    mask_ST = torch.arange(5) < counts_S[:, None]
    padded_ST = torch.zeros(4, 5, dtype=torch.float64).masked_scatter(mask_ST, new_N)
    old_S = torch.zeros(4, dtype=torch.float64).index_add(0, answer_N, old_N)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded_ST, torch.zeros(4, 5), None),
        accelerator=SimpleNamespace(gather=lambda each: each, reduce=lambda each, **_: each),
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 5, dtype=torch.long),
        "completion_mask": mask_ST.double(),
        "advantages": advantage_S,
        "old_logps": old_S,
    }
    theirs = unwrap(trainer_module.RLOOTrainer._compute_loss)(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, new_N)

    log_ratio_N = log_ratios(new_N, old_N, answer_N, counts_S, "answer")
    loss_N, is_clipped_N = clipped_surrogate(
        log_ratio_N, advantage_S[answer_N], clip_low=0.2, clip_high=0.2
    )
    ours = (shares(counts_S, "sequence", max_length=5)[answer_N] * loss_N).sum()
    assert not is_clipped_N.all()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, new_N)[0], their_gradient)
    assert their_gradient.any()


@pytest.mark.parametrize("normalize", ["sequence", "tokens", "length"])
def test_shares_are_of_the_whole_update_and_a_masked_answer_has_none(normalize):
    counts_S = torch.tensor([4, 0, 1, 3])
    found = shares(counts_S, normalize, max_length=6)
    expected = {
        "sequence": [1 / 16, None, 1 / 4, 1 / 12],
        "tokens": [1 / 8, None, 1 / 8, 1 / 8],
        "length": [1 / 24, None, 1 / 24, 1 / 24],
    }[normalize]
    assert [found[at].item() for at in (0, 2, 3)] == pytest.approx(
        [expected[at] for at in (0, 2, 3)]
    )
    assert shares(torch.zeros(3), normalize, max_length=6).isfinite().all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_a_generalized_advantage_is_the_discounted_sum_of_all_later_surprises(gamma, lam):
    chance = torch.Generator().manual_seed(0)
    reward_T, value_T = torch.randn(2, 7, generator=chance, dtype=torch.float64)
    found = generalized_advantages(reward_T, value_T, gamma=gamma, lam=lam)
    rewards, values = reward_T.tolist(), [*value_T.tolist(), 0.0]
    surprises = [rewards[at] + gamma * values[at + 1] - values[at] for at in range(7)]
    for at, advantage in enumerate(found.tolist()):
        later = [(gamma * lam) ** (step - at) * surprises[step] for step in range(at, 7)]
        assert advantage == pytest.approx(sum(later), rel=1e-12)


def test_without_discount_and_values_an_advantage_is_the_sum_of_the_rewards_to_come():
    reward_T = torch.tensor([0.5, -0.25, 0.0, 2.0], dtype=torch.float64)
    found = generalized_advantages(reward_T, torch.zeros_like(reward_T), gamma=1.0, lam=1.0)
    assert found.tolist() == [2.25, 1.75, 2.0, 2.0]


def test_whitened_values_have_mean_0_and_variance_1_and_equal_ones_are_0():
    chance = torch.Generator().manual_seed(0)
    value_N = 3 + 5 * torch.randn(50, generator=chance, dtype=torch.float64)
    found = whiten(value_N).tolist()
    assert sum(found) == pytest.approx(0, abs=1e-9)
    assert sum(one * one for one in found) / 50 == pytest.approx(1, abs=1e-8)
    assert whiten(torch.full((3,), 0.5, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_the_loss_of_values_is_the_larger_of_the_plain_and_the_clipped_one():
    """And its gradient is that of the larger one: 0 where that is clipped."""
    old, returns, clip = 1.0, [1.5, 0.5, 3.0, -1.0, 1.0], 0.2
    values = [0.3, 0.9, 1.0, 1.1, 1.5, 2.5]
    for target in returns:
        for value in values:
            value_N = torch.tensor([value], dtype=torch.float64, requires_grad=True)
            loss_N, is_clipped_N = clipped_value_loss(
                value_N,
                torch.tensor([old], dtype=torch.float64),
                torch.tensor([target], dtype=torch.float64),
                clip=clip,
            )
            bounded = min(max(value, old - clip), old + clip)
            plain, clipped = (value - target) ** 2 / 2, (bounded - target) ** 2 / 2
            assert loss_N.item() == pytest.approx(max(plain, clipped), rel=1e-12)
            loss_N.sum().backward()
            is_clipped = bounded != value and clipped > plain
            assert is_clipped_N.item() == is_clipped
            assert value_N.grad.item() == pytest.approx(0 if is_clipped else value - target)


def test_a_critic_explains_nothing_if_constant_and_everything_if_right():
    return_N = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    assert explained_variance(return_N + 7, return_N) == pytest.approx(1)
    assert explained_variance(torch.full_like(return_N, 2.0), return_N) == pytest.approx(0)
    assert explained_variance(-return_N, return_N) == pytest.approx(-3)
    assert explained_variance(return_N, torch.ones_like(return_N)) is None
    assert explained_variance(return_N[:0], return_N[:0]) is None
