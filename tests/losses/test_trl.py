"""Losses over pairs and from a teacher against those of TRL, which the `dev` extra pins."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.preference import (
    bradley_terry_loss,
    dpo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    simpo_loss,
)

pytest.importorskip("trl", reason="an oracle alone: pip install trl==1.16.0")

NUM_ROWS, LENGTH = 6, 9
CPU = SimpleNamespace(device="cpu", gather=lambda each: each, gather_for_metrics=lambda each: each)


def log_probs(seed, rows=NUM_ROWS):
    """Log-probabilities per token, of answers of uneven lengths, and where the answers are."""
    chance = torch.Generator().manual_seed(seed)
    values_ST = -3 * torch.rand(rows, LENGTH - 1, generator=chance, dtype=torch.float64)
    ends_S = torch.randint(3, LENGTH, (rows,), generator=chance)
    columns_T = torch.arange(LENGTH)
    mask_ST = ((columns_T >= 2) & (columns_T <= ends_S[:, None])).long()
    return (values_ST * mask_ST[:, 1:]).requires_grad_(), mask_ST


def outputs_of(log_prob_ST):
    """What a model of TRL answers."""
    more = {name: torch.zeros_like(log_prob_ST) for name in ("entropy", "mean_logits")}
    hits = torch.zeros_like(log_prob_ST, dtype=torch.bool)
    return SimpleNamespace(log_probs=log_prob_ST, is_top1=hits, **more)


def trainer_of(**settings):
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=CPU,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def agree(loss, theirs, leaves):
    torch.testing.assert_close(loss, theirs)
    ours = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves)
    for mine, other in zip(ours, expected, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("name", "form", "length"),
    [
        ("sigmoid", "sigmoid", "sum"),
        ("hinge", "hinge", "sum"),
        ("robust", "robust", "sum"),
        ("sigmoid_norm", "sigmoid", "mean"),
        ("ipo", "ipo", "mean"),
    ],
)
def test_dpo_is_that_of_its_trainer(name, form, length):
    from trl.trainer.dpo_trainer import DPOTrainer

    log_prob_ST, mask_ST = log_probs(0)
    reference_S = log_probs(1)[0].sum(dim=1).detach()
    trainer = trainer_of(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=0.1,
        use_weighting=False,
    )
    half = NUM_ROWS // 2
    inputs = {
        "input_ids": torch.zeros(NUM_ROWS, LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(NUM_ROWS, LENGTH),
        "completion_mask": mask_ST,
        "ref_chosen_logps": reference_S[:half],
        "ref_rejected_logps": reference_S[half:],
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(log_prob_ST), inputs, False)
    ratio_S = log_prob_ST.sum(dim=1) - reference_S
    if length == "mean":
        ratio_S = ratio_S / mask_ST.sum(dim=1)
    margin_P = ratio_S[:half] - ratio_S[half:]
    smoothing = 0.1 if form == "robust" else 0.0
    loss_P = dpo_loss(margin_P, form=form, beta=0.3, label_smoothing=smoothing)
    agree(loss_P.mean(), theirs, [log_prob_ST])


def test_simpo_is_that_of_cpo_without_its_own_term():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen_P, rejected_P = (log_probs(seed)[0].mean(dim=1) for seed in (0, 1))
    leaves = [chosen_P.detach().requires_grad_(), rejected_P.detach().requires_grad_()]
    trainer = trainer_of(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0
    )
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *leaves)
    agree(simpo_loss(*leaves, beta=2.0, gamma=0.7).mean(), theirs.mean(), leaves)


def test_the_odds_ratio_is_that_of_orpo():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    leaves = [log_probs(seed)[0].mean(dim=1).detach().float().requires_grad_() for seed in (0, 1)]
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer_of(beta=0.4), *leaves)
    ours = orpo_loss(*leaves, beta=0.4) + leaves[0]
    agree(ours.mean(), -theirs.mean(), leaves)


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 0, 1], [1] * 6, [0] * 6])
def test_kto_is_that_of_its_trainer_in_one_micro_batch(labels):
    from trl.trainer.kto_trainer import KTOTrainer

    log_prob_ST, mask_ST = log_probs(0)
    reference_S = log_probs(1)[0].sum(dim=1).detach()
    # TRL takes the mean of the answers that were moved on by one place.
    other_S, other_reference_S = (log_probs(seed)[0].sum(dim=1).detach() for seed in (2, 3))
    trainer = trainer_of(
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: other_S,
    )
    inputs = {
        "input_ids": torch.zeros(NUM_ROWS, LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(NUM_ROWS, LENGTH),
        "completion_mask": mask_ST,
        "label": torch.tensor(labels),
        "ref_logps": reference_S,
        "ref_KL_logps": other_reference_S,
    }
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(log_prob_ST), inputs, False)
    z0 = kto_baseline((other_S - other_reference_S).sum(), torch.tensor(NUM_ROWS))
    loss_S = kto_loss(
        log_prob_ST.sum(dim=1) - reference_S,
        torch.tensor(labels).bool(),
        z0,
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )
    agree(loss_S.mean(), theirs, [log_prob_ST])


def test_bradley_terry_is_that_of_the_reward_trainer():
    from trl.trainer.reward_trainer import RewardTrainer

    chance = torch.Generator().manual_seed(0)
    score_S = torch.randn(NUM_ROWS, dtype=torch.float64, generator=chance).requires_grad_()
    trainer = trainer_of(args=SimpleNamespace(center_rewards_coefficient=0.02))
    margins_P = torch.full((NUM_ROWS // 2,), 0.4)
    inputs = {"attention_mask": torch.ones(NUM_ROWS, LENGTH), "margin": margins_P}
    answer = SimpleNamespace(logits=score_S[:, None])
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: answer, inputs)
    chosen_P, rejected_P = score_S.chunk(2)
    agree(
        bradley_terry_loss(chosen_P, rejected_P, margin=0.4, center=0.02).mean(), theirs, [score_S]
    )


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        (TeacherDivergence("forward_kl"), 0.0),
        (TeacherDivergence("forward_kl", temperature=2.0), 0.0),
        (TeacherDivergence("reverse_kl"), 1.0),
        (TeacherDivergence("reverse_kl", temperature=0.7), 1.0),
        (TeacherDivergence("jsd"), 0.5),
        (TeacherDivergence("jsd", beta=0.1, temperature=3.0), 0.1),
        (TeacherDivergence("jsd", beta=0.9), 0.9),
    ],
)
@pytest.mark.filterwarnings("ignore:You are importing from")
def test_divergences_from_a_teacher_are_those_of_gkd(divergence, beta):
    from trl.experimental.gkd import GKDTrainer

    chance = torch.Generator().manual_seed(1)
    student_NV, teacher_NV = torch.randn(2, 40, 97, generator=chance, dtype=torch.float64) * 3
    student_NV.requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(
        student_NV[None],
        teacher_NV[None],
        beta=beta,
        temperature=divergence.temperature,
        reduction="sum",
    )
    (theirs_NV,) = torch.autograd.grad(theirs, student_NV)
    found_N, found_NV = divergence.of_logits(student_NV.detach(), teacher_NV.clone())
    torch.testing.assert_close(found_N.sum(), theirs.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_NV, theirs_NV, rtol=1e-9, atol=1e-12)
