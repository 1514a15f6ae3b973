"""`loss.normalize: weights`: an update is the mean over its weights, however it is cut up."""

import pytest
import torch

from tests.training.conftest import relative_difference, slow_losses, weights_of
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.targets import TokenWeight
from yrunner.training.metrics import read_metrics

PLAIN_STEPS = dict(optimizer="sgd", learning_rate=0.3, max_grad_norm=0.0, weight_decay=0.0)
CUTS = [(6, 1), (1, 6), (3, 2)]
NO_WEIGHT = TokenWeight(lambda loss_N, _: torch.zeros_like(loss_N))


def places_of_group(example, group, token_batch):
    """The targets that a group of token batches learns; all of them without token batches."""
    places = example.target_positions
    return places[group * token_batch : (group + 1) * token_batch] if token_batch else places


def slow_gradient(model, examples, update, token_batch):
    """Set the gradient of sum(weight x loss) / sum(weight) over all targets of an update."""
    parts = [
        slow_losses(
            model, examples[example], places_of_group(examples[example], group, token_batch)
        )
        for row in update
        for example, group in row
    ]
    loss_N = torch.cat(parts)
    weight_N = nlirg_weight(loss_N.detach())
    model.zero_grad()
    ((weight_N * loss_N).sum() / weight_N.sum()).backward()


def slow_step(model, rate):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad


@pytest.mark.parametrize("token_batch", [0, 7])
@pytest.mark.parametrize(("batch_size", "accumulation"), CUTS)
def test_every_update_is_the_weighted_mean_over_its_weights(
    make_model, examples, make_trainer, token_batch, batch_size, accumulation
):
    model, reference = make_model(), make_model()
    trainer = make_trainer(
        model,
        examples[:8],
        loss="nlirg_by_weights",
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        token_batch=token_batch,
        max_steps=3,
        epochs=None,
        **PLAIN_STEPS,
    )
    trainer.train()
    for update in trainer.plan.updates():
        slow_gradient(reference, examples, update, token_batch)
        slow_step(reference, rate=0.3)
    assert relative_difference(make_model(), model) > 1e-3, "training must change something"
    assert relative_difference(model, reference) < 1e-6


@pytest.mark.parametrize(("batch_size", "accumulation"), CUTS)
def test_the_gradient_is_clipped_after_it_is_divided(
    make_model, examples, make_trainer, batch_size, accumulation
):
    """The length that is logged, and compared with the longest allowed, is that of the mean."""
    model, reference = make_model(), make_model()
    trainer = make_trainer(
        model,
        examples[:6],
        loss="nlirg_by_weights",
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **(PLAIN_STEPS | {"learning_rate": 1.0, "max_grad_norm": 0.01}),
    )
    trainer.train()
    (update,) = trainer.plan.updates()
    slow_gradient(reference, examples, update, token_batch=0)
    length = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01).item()
    slow_step(reference, rate=1.0)
    (record,) = read_metrics(trainer.run_dir.metrics)
    assert length > 0.1
    assert record["grad_norm"] == pytest.approx(length, rel=1e-4)
    steps = [weights_of(make_model()) - weights_of(it) for it in (model, reference)]
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[1].norm()


@pytest.mark.parametrize("token_batch", [0, 7])
@pytest.mark.parametrize(("batch_size", "accumulation"), CUTS)
def test_an_update_without_weight_changes_nothing(
    make_model, examples, make_trainer, token_batch, batch_size, accumulation
):
    model = make_model()
    trainer = make_trainer(
        model,
        examples[:6],
        loss="nlirg_by_weights",
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        token_batch=token_batch,
        **(PLAIN_STEPS | {"max_grad_norm": 1.0}),
    )
    trainer.objective.weight = NO_WEIGHT
    trainer.train()
    assert torch.equal(weights_of(model), weights_of(make_model()))
    for record in read_metrics(trainer.run_dir.metrics):
        assert (record["mean_weight"], record["refused"], record["grad_norm"]) == (0, 1, 0)


def test_weights_that_are_all_alike_give_the_plain_update(make_model, examples, make_trainer):
    """Halving every weight halves an update over targets and changes nothing over weights."""
    reached = []
    for loss, height in (("plain", 1.0), ("nlirg_by_weights", 0.5)):
        reached.append(make_model())
        trainer = make_trainer(
            reached[-1],
            examples[:12],
            loss=loss,
            folder=loss,
            batch_size=2,
            gradient_accumulation_steps=3,
            **PLAIN_STEPS,
        )
        trainer.objective.weight = TokenWeight(
            lambda loss_N, _, h=height: torch.full_like(loss_N, h)
        )
        trainer.train()
    assert relative_difference(make_model(), reached[0]) > 1e-3
    assert relative_difference(*reached) < 1e-6
