"""Kept rows beside the field's: the loss of an update, whatever its micro-batches."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.conftest import relative_difference, slow_losses, weights_of
from yrunner.data.batching.collate import all_in_one_row, fit_rows, one_per_row
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.losses.nlirg import nlirg_weight
from yrunner.scoring.base_predictions import cache_predictions
from yrunner.training.metrics import read_metrics
from yrunner.training.replay_loss import HeldRows, KeptMean, MicroBatch
from yrunner.training.rng_snapshot import Snapshot

ONE_STEP = dict(optimizer="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
STRENGTH = 2.0


def fitted(lengths):
    return fit_rows(lengths, hidden_size=32)


@pytest.fixture
def make_tuned(make_model):
    """A model that has moved from its base a little: with an adapter, or in all its weights."""

    def make(kind="lora"):
        torch.manual_seed(1)
        if kind == "full":
            return make_model(seed=1)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(make_model(), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def hold(make_model, capitals_tokenizer):
    """Let a trainer hold its model to the base on some rows."""
    pad = capitals_tokenizer.pad_token_id

    def hold_trainer(trainer, rows, kind="lora", *, by_text=False, pack_to=None):
        tops = None
        if kind == "full":
            tops = cache_predictions(
                make_model(), rows, top=10_000, pad_token_id=pad, max_tokens=500
            )
        plan = make_keep_plan(
            [len(row.target_positions) for row in rows],
            [len(row.input_ids) for row in rows],
            per_update=trainer.plan.kept,
            seed=0,
            pack_to=pack_to,
        )
        keeping = HeldRows(
            rows,
            plan,
            lanes=trainer.plan.lanes,
            strength=STRENGTH,
            by_text=by_text,
            tops=tops,
            pad_token_id=pad,
            layout=trainer.batches.layout,
        )
        trainer.objective.regulariser = keeping
        return trainer

    return hold_trainer


def slow_divergences(model, base, example):
    """KL(base || model) at each target, from all logits of one example alone."""
    places = [place - 1 for place in example.target_positions]
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        log_base = base(ids).logits[0, places].log_softmax(-1)
    return (log_base.exp() * (log_base - model(ids).logits[0, places].log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("kind", ["lora", "full", "text"])
@pytest.mark.parametrize(
    ("layout", "pack_to"),
    [(one_per_row, None), (fitted, None), (all_in_one_row, 100)],
    ids=["alone", "together", "packed"],
)
def test_an_update_learns_the_field_and_is_held_at_the_kept_rows(
    make_model, make_tuned, examples, make_trainer, hold, kind, layout, pack_to
):
    model, slow = make_tuned(kind), make_tuned(kind)
    rows = dict(batch_size=8, kept=3, layout=layout, pack_to=pack_to)
    trainer = make_trainer(model, examples[:5], loss="nlirg", **rows, **ONE_STEP)
    hold(trainer, examples[20:26], kind, by_text=kind == "text", pack_to=pack_to)
    chosen = trainer.objective.regulariser.plan.rows(0)
    assert (max(map(len, chosen)) > 1) == (pack_to is not None)
    kept = [examples[20 + example] for row in chosen for example in row]
    before = weights_of(slow)
    trainer.train()
    loss_N = torch.cat([slow_losses(slow, example) for example in examples[:5]])
    loss = (nlirg_weight(loss_N.detach()) * loss_N).mean()
    base = make_model()
    if kind == "text":
        held_N = torch.cat([slow_losses(slow, example) for example in kept])
    else:
        held_N = torch.cat([slow_divergences(slow, base, example) for example in kept])
    (loss + STRENGTH * held_N.mean()).backward()
    with torch.no_grad():
        for weight in slow.parameters():
            if weight.grad is not None:
                weight -= weight.grad
    moved = (weights_of(slow) - before).norm()
    assert (weights_of(slow) - weights_of(model)).norm() < 1e-4 * moved
    (record,) = read_metrics(trainer.run_dir.metrics)
    name = "keep_text_loss" if kind == "text" else "keep_divergence"
    assert record[name] == pytest.approx(held_N.mean().item(), rel=1e-4)
    assert record["targets"] == len(loss_N), "kept targets are no targets of the field"


@pytest.mark.parametrize(("kind", "token_batch"), [("lora", 7), ("full", 0)])
def test_accumulation_changes_nothing_where_rows_are_kept(
    make_tuned, examples, make_trainer, hold, kind, token_batch
):
    reached = []
    for batch_size, accumulation in ((16, 1), (4, 4), (1, 16)):
        model = make_tuned(kind)
        trainer = make_trainer(
            model,
            examples,
            loss="nlirg",
            folder=f"run-{batch_size}",
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            token_batch=token_batch,
            learning_rate=1e-3,
            kept=5,
            max_steps=2,
        )
        hold(trainer, examples[20:33], kind).train()
        reached.append(model)
    assert relative_difference(make_tuned(kind), reached[0]) > 5e-5
    assert relative_difference(reached[0], reached[1]) < 1e-5
    assert relative_difference(reached[0], reached[2]) < 1e-5


def test_the_kept_rows_of_an_update_lie_in_its_micro_batches_once(
    make_tuned, examples, make_trainer, hold
):
    for batch_size, accumulation in ((16, 1), (4, 4), (2, 8), (1, 16)):
        trainer = make_trainer(
            make_tuned(),
            examples,
            folder=f"run-{batch_size}",
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            kept=5,
        )
        keeping = hold(trainer, examples[20:33]).objective.regulariser
        for update in (0, 1, 7):
            found = [
                example
                for number in range(accumulation)
                for example in keeping.examples_of(MicroBatch(update, number, batch_size))
            ]
            assert found == [row[0] for row in keeping.plan.rows(update)]


def test_a_process_without_kept_rows_takes_part_where_another_has_some(
    make_tuned, examples, make_trainer, hold
):
    model = make_tuned()
    trainer = make_trainer(model, examples, batch_size=4, gradient_accumulation_steps=4, kept=5)
    keeping = hold(trainer, examples[20:33]).objective.regulariser
    assert keeping.loss(model, model, MicroBatch(0, 1, 4, at_once=2)) is None, "nor has the other"
    assert keeping.loss(model, model, MicroBatch(0, 2, 4, at_once=2)).item() > 0
    empty = keeping.loss(model, model, MicroBatch(0, 0, 4, at_once=4))
    assert empty.item() == 0
    empty.backward()
    assert keeping.mean.take(lambda sums: sums) > 0


def test_dropout_of_the_adapter_does_not_reach_the_base(
    make_model, capitals_tokenizer, examples, make_trainer, hold
):
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    trainer = make_trainer(model, examples[:8], batch_size=4, kept=2, max_steps=2)
    hold(trainer, examples[20:24])
    model.train()
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    loss = trainer.objective.regulariser.loss(model, model, MicroBatch(0, 0, 4))
    assert model.training
    assert before == {name: weight.requires_grad for name, weight in model.named_parameters()}
    # A new adapter changes nothing yet, whatever dropout leaves of it.
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_an_update_that_is_taken_back_or_resumed_is_in_the_mean_once():
    mean, resumed = KeptMean(), KeptMean()
    mean.add(torch.tensor(6.0), 4)
    standing = Snapshot([mean])
    mean.add(torch.tensor(100.0), 1)
    standing.restore()
    resumed.load_state_dict(json.loads(json.dumps(mean.state_dict())))
    for each in (mean, resumed):
        each.add(torch.tensor(2.0), 4)
        assert each.take(lambda sums: sums) == pytest.approx(1.0)
        assert each.sums_2 is None


def test_strength_beside_the_mean_of_the_field_does_not_depend_on_the_share(
    make_tuned, examples, make_trainer, hold
):
    sizes = []
    for kept in (2, 6):
        model = make_tuned()
        trainer = make_trainer(model, examples[:8], batch_size=8, kept=kept, folder=f"{kept}")
        hold(trainer, [examples[20]] * 6)
        sizes.append(trainer.objective.regulariser.loss(model, model, MicroBatch(0, 0, 8)).item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
    assert math.isfinite(sizes[0]) and sizes[0] > 0
