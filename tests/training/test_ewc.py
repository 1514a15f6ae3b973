"""EWC: the Fisher information against the slow way, and the spring that comes of it."""

import pytest
import torch

from tests.training.conftest import slow_losses
from yrunner.training.ewc import (
    EwcPenalty,
    estimate_fisher,
    load_fisher,
    save_fisher,
    trained_weights,
)
from yrunner.training.replay_loss import MicroBatch


def test_the_fisher_information_is_the_mean_square_of_each_rows_gradient(
    make_model, examples, capitals_tokenizer, tmp_path
):
    model, slow = make_model(), make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    rows = examples[:4]
    fisher = estimate_fisher(model, rows, pad_token_id=capitals_tokenizer.pad_token_id)
    assert fisher.keys() == trained_weights(model).keys()
    assert all(weight.grad is None for weight in model.parameters())
    slow.model.embed_tokens.weight.requires_grad_(False)
    expected = {name: torch.zeros_like(weight) for name, weight in trained_weights(slow).items()}
    num_targets = 0
    for row in rows:
        slow.zero_grad()
        loss_N = slow_losses(slow, row)
        loss_N.sum().backward()
        num_targets += len(loss_N)
        for name, weight in trained_weights(slow).items():
            expected[name] += weight.grad**2
    save_fisher(fisher, tmp_path / "fisher.safetensors")
    for name, tensor in load_fisher(tmp_path / "fisher.safetensors", model).items():
        torch.testing.assert_close(tensor, expected[name] / num_targets, rtol=1e-3, atol=1e-8)


def test_a_spring_is_as_strong_as_the_base_depends_on_its_weight(make_model):
    model = make_model()
    fisher = {name: torch.full_like(w, 0.5) for name, w in trained_weights(model).items()}
    springs = EwcPenalty(model, fisher, strength=3.0)
    assert springs.loss(model, model, MicroBatch(0, 0, 4)).item() == 0
    rounded = make_model()
    held = EwcPenalty(rounded, fisher, strength=3.0)
    assert held.loss(rounded.bfloat16(), rounded, MicroBatch(0, 0, 4)).item() == 0, (
        "as DeepSpeed does"
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    loss = springs.loss(model, model, MicroBatch(1, 0, 4))
    number = sum(weight.numel() for weight in trained_weights(model).values())
    assert loss.item() == pytest.approx(3.0 * 0.5 * 0.5 * 0.01 * number, rel=1e-4)
    loss.backward()
    for weight in model.parameters():
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 3.0 * 0.5 * 0.1))
    assert springs.loss(model, model, MicroBatch(1, 1, 4)) is None, "once in an update"
    assert springs.mean.take(lambda sums: sums) == pytest.approx(loss.item() / 3.0 / 2, rel=1e-4)
    assert springs.mean.sums_2 is None


def test_springs_hold_a_training_back(make_model, examples, make_trainer, capitals_tokenizer):
    moved = []
    for strength in (0.0, 1e6):
        model, start = make_model(), make_model()
        trainer = make_trainer(model, examples[:8], folder=f"{strength}", learning_rate=1e-3)
        fisher = estimate_fisher(model, examples[20:24], pad_token_id=trainer.batches.pad_token_id)
        trainer.objective.regulariser = EwcPenalty(model, fisher, strength)
        trainer.train()
        distances = [
            (fisher[name] * (weight - before).square()).sum()
            for (name, weight), before in zip(
                trained_weights(model).items(), start.parameters(), strict=True
            )
        ]
        moved.append(torch.stack(distances).sum().item())
    assert moved[1] < 0.5 * moved[0]
