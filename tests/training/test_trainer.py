"""The trainer: what it learns from, that accumulation changes nothing, and what it logs."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from tests.training.conftest import LOSSES, relative_difference, slow_losses, weights_of
from yrunner.data.batching.collate import all_in_one_row, fit_rows, one_per_row
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.score_head import add_critic
from yrunner.losses.targets import TokenWeight
from yrunner.recipe.schema.recipe import Checkpoint
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import optimizer_for
from yrunner.training.metrics import read_metrics, validation_losses

ONE_PLAIN_STEP = dict(optimizer="sgd", learning_rate=1.0, max_grad_norm=0.0)
"""The weights move by the gradient itself."""


def fitted(lengths):
    return fit_rows(lengths, hidden_size=32)


def spy_on_losses(trainer):
    """The list that the loss of every target will be written to, micro-batch by micro-batch."""
    seen = []
    weight = trainer.objective.weight

    def spy(loss_N, entropy_N):
        seen.append(loss_N)
        return weight.of(loss_N, entropy_N)

    trainer.objective.weight = TokenWeight(spy, weight.top)
    return seen


def losses_one_by_one(model, examples):
    """The loss of every target, one example at a time, all logits, no padding."""
    model.eval()
    with torch.no_grad():
        return torch.cat([slow_losses(model, example) for example in examples])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("token_batch", [0, 7])
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adamw_torch", 1e-3)])
def test_accumulation_changes_nothing(
    make_model, examples, make_trainer, loss, token_batch, optimizer, rate
):
    reached = []
    for batch_size, accumulation in ((16, 1), (4, 4), (1, 16)):
        model = make_model()
        trainer = make_trainer(
            model,
            examples[:24],  # a whole update and a half
            loss=loss,
            folder=f"run-{batch_size}",
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            token_batch=token_batch,
            optimizer=optimizer,
            learning_rate=rate,
        )
        trainer.train()
        reached.append(model)
    assert relative_difference(make_model(), reached[0]) > 1e-4, "training must change something"
    assert relative_difference(reached[0], reached[1]) < 1e-5
    assert relative_difference(reached[0], reached[2]) < 1e-5


@pytest.mark.parametrize("token_batch", [0, 1, 10, 1000])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 2)])
def test_every_target_is_trained_exactly_once_per_epoch(
    make_model, examples, make_trainer, token_batch, batch_size, accumulation
):
    seen = Counter()
    trainer = make_trainer(
        make_model(),
        examples[:9],
        epochs=2,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        token_batch=token_batch,
        log_every=1000,
    )
    learn = trainer.learn

    def spy(batch, *arguments, **keys):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for place, label in enumerate(labels):
                if label != IGNORE_INDEX:
                    seen[tuple(ids[: place + 1])] += 1
        learn(batch, *arguments, **keys)

    trainer.learn = spy
    trainer.train()
    expected = Counter(
        tuple(example.input_ids[: place + 1])
        for example in examples[:9]
        for place in example.target_positions
    )
    assert seen == Counter({target: 2 * times for target, times in expected.items()})


@pytest.mark.parametrize("loss", ["plain", "nlirg"])
def test_the_logged_figures_are_those_of_the_targets_before_the_update(
    make_model, examples, make_trainer, loss
):
    model = make_model()
    loss_N = losses_one_by_one(model, examples[:8])
    weight_N = nlirg_weight(loss_N) if loss == "nlirg" else torch.ones_like(loss_N)
    trainer = make_trainer(
        model, examples[:8], loss=loss, batch_size=2, gradient_accumulation_steps=4
    )
    trainer.train()
    (record,) = read_metrics(trainer.run_dir.metrics)
    assert record["targets"] == len(loss_N)
    assert record["loss"] == pytest.approx(loss_N.mean().item(), rel=1e-5)
    assert record["weighted_loss"] == pytest.approx((weight_N * loss_N).mean().item(), rel=1e-5)
    assert record["mean_weight"] == pytest.approx(weight_N.mean().item(), rel=1e-5)
    shares = [record[f"zone_{name}"] for name in ("easy", "learning", "hard", "refused")]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx((loss_N <= 1.45).double().mean().item())
    pulls = [record[f"gradient_{name}"] for name in ("easy", "learning", "hard", "refused")]
    assert sum(pulls) == pytest.approx(1)
    assert 0 < record["entropy"] < 6 and 0 <= record["accuracy"] <= 1
    needed = {"step", "epoch", "learning_rate", "grad_norm", "targets_per_second", "memory_gib"}
    assert needed <= set(record)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_validation_is_the_plain_loss_per_target_whatever_the_batches(
    make_model, examples, make_trainer, batch_size
):
    model = make_model()
    expected = losses_one_by_one(model, examples[:10]).mean().item()
    trainer = make_trainer(model, examples[10:], examples[:10], loss="nlirg", batch_size=batch_size)
    assert trainer.validate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_an_update_is_that_of_the_weighted_mean_over_its_targets(
    make_model, examples, make_trainer
):
    model, reference = make_model(), make_model()
    trainer = make_trainer(
        model,
        examples[:6],
        loss="nlirg",
        batch_size=2,
        gradient_accumulation_steps=3,
        optimizer="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    trainer.train()
    loss_N = torch.cat([slow_losses(reference, example) for example in examples[:6]])
    (nlirg_weight(loss_N.detach()) * loss_N).mean().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= parameter.grad
    assert relative_difference(model, reference) < 1e-6


@pytest.mark.parametrize("loss", ["plain", "nlirg"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", [fitted, all_in_one_row])
def test_packing_changes_nothing(make_model, examples, make_trainer, loss, attention, layout):
    """One update over the same examples, each alone or packed: equal losses, equal gradient."""
    losses, weights = [], []
    for pack_to, lay_out in ((None, one_per_row), (200, layout)):
        model = make_model()
        model.set_attn_implementation(attention)
        trainer = make_trainer(
            model,
            examples,
            loss=loss,
            folder=f"run-{pack_to}",
            batch_size=5,
            gradient_accumulation_steps=8,
            pack_to=pack_to,
            layout=lay_out,
            **ONE_PLAIN_STEP,
        )
        losses.append(spy_on_losses(trainer))
        trainer.train()
        weights.append(weights_of(model))
    assert trainer.plan.num_updates == 1 and len(trainer.plan.packs) < 20
    alone_N, packed_N = (torch.cat(it).sort().values for it in losses)
    torch.testing.assert_close(packed_N, alone_N, rtol=1e-5, atol=1e-6)
    gradients = [weights_of(make_model()) - reached for reached in weights]
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_a_leak_between_packed_examples_would_be_seen(make_model, examples, make_trainer):
    """The comparison above fails where positions do not restart."""
    reached = []
    for layout in (one_per_row, all_in_one_row):
        reached.append(make_model())
        trainer = make_trainer(
            reached[-1],
            examples,
            folder=layout.__name__,
            batch_size=40,
            layout=layout,
            **ONE_PLAIN_STEP,
        )
        collate = trainer.batches.collate
        trainer.batches.collate = lambda rows, collate=collate: without_positions(collate(rows))
        trainer.train()
    gradients = [weights_of(make_model()) - weights_of(model) for model in reached]
    assert (gradients[1] - gradients[0]).norm() > 1e-2 * gradients[0].norm()


def without_positions(batch):
    return {name: tensor for name, tensor in batch.items() if name != "position_ids"}


@pytest.mark.parametrize("layout", [fitted, all_in_one_row])
def test_packing_changes_nothing_about_validation_and_adapters(
    make_model, examples, make_trainer, layout
):
    gradients, validation = [], []
    for lay_out in (one_per_row, layout):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
        before = weights_of(model)
        trainer = make_trainer(
            model,
            examples[8:],
            examples[:8],
            folder=lay_out.__name__,
            pack_to=None if lay_out is one_per_row else 150,
            batch_size=32,
            layout=lay_out,
            **ONE_PLAIN_STEP,
        )
        trainer.train()
        gradients.append(before - weights_of(model))
        validation.append(trainer.validate()["eval_loss"])
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert validation[1] == pytest.approx(validation[0], rel=1e-5)


def test_a_token_batch_sees_the_updates_of_the_groups_before_it(make_model, examples, make_trainer):
    """Trained by groups, the second group's logged loss is that of a model that has learned one."""
    example = examples[3]
    model = make_model()
    trainer = make_trainer(model, [example], token_batch=5, learning_rate=1e-2, batch_size=1)
    trainer.train()
    records = read_metrics(trainer.run_dir.metrics)
    untrained = losses_one_by_one(make_model(), [example])
    assert records[0]["loss"] == pytest.approx(untrained[:5].mean().item(), rel=1e-5)
    assert records[1]["loss"] < untrained[5:10].mean().item()
    assert len(records) == -(-len(untrained) // 5)
    assert sum(record["targets"] for record in records) == len(untrained)


def test_gradient_checkpointing_changes_nothing_but_memory(make_model, examples, make_trainer):
    models = []
    for checkpointing in (False, True):
        models.append(make_model())
        make_trainer(
            models[-1],
            examples[:8],
            folder=f"run-{checkpointing}",
            gradient_checkpointing=checkpointing,
        ).train()
    assert relative_difference(*models) < 1e-6


def test_a_model_learns_in_bfloat16_and_its_trained_weights_stay_in_float32(
    make_model, examples, make_trainer
):
    model = make_model()
    trainer = make_trainer(model, examples, epochs=4, dtype=torch.bfloat16, learning_rate=1e-2)
    trainer.train()
    records = read_metrics(trainer.run_dir.metrics)
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "adagrad",
        "rmsprop",
        "sgd",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
        "ademamix_8bit",
    ],
)
def test_every_optimizer_of_the_schema_takes_steps(make_model, examples, make_trainer, optimizer):
    model = make_model()
    make_trainer(model, examples[:4], optimizer=optimizer).train()
    assert relative_difference(make_model(), model) > 0


def test_lora_plus_multiplies_the_rate_of_the_second_matrices_alone(make_model):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    arguments = TrainingArguments("unused", learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    optimizer = optimizer_for(model, arguments, 16.0)
    rates = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    trained = [named for named in model.named_parameters() if named[1].requires_grad]
    assert len(rates) == len(trained)
    for name, weight in trained:
        assert rates[id(weight)] == (16e-3 if "lora_B" in name else 1e-3, 0.1), name


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_critic_may_have_a_learning_rate_of_its_own(make_model, ratio):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    add_critic(model)
    arguments = TrainingArguments("unused", learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    optimizer = optimizer_for(model, arguments, ratio, 1e-2)
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the rate that is logged"
    rates = {
        id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]
    }
    trained = [named for named in model.named_parameters() if named[1].requires_grad]
    assert len(rates) == len(trained)
    for name, weight in trained:
        expected = 1e-2 if ".critic." in name else 1e-3
        expected *= ratio if "lora_B" in name else 1
        assert rates[id(weight)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("every", "validated", "saved"),
    [(None, [4, 8, 10], [4, 8, 10]), (3, [3, 6, 9, 10], None), ("epoch", [5, 10], None)],
)
def test_validations_come_at_their_own_updates_and_the_best_is_saved(
    make_model, examples, make_trainer, every, validated, saved
):
    trainer = make_trainer(
        make_model(),
        examples[:10],
        examples[10:14],
        batch_size=2,
        epochs=2,
        learning_rate=1e-3,
        checkpoint=Checkpoint(every=4, keep=10),
        validate_every=every,
    )
    trainer.train()
    losses = validation_losses(read_metrics(trainer.run_dir.metrics))
    assert list(losses) == validated
    bests = [step for step in losses if losses[step] == min(losses[s] for s in losses if s <= step)]
    assert trainer.run_dir.saved_steps() == (saved or sorted({4, 8, 10, *bests}))
    assert trainer.result_step == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("scheduler", "first", "last"),
    [
        ("linear", 1.0, 0.1),
        ("cosine", 1.0, 0.0245),
        ("constant", 1.0, 1.0),
        ("constant_with_warmup", 1.0, 1.0),
        ("polynomial", 1.0, 0.1),
        ("inverse_sqrt", 1.0, 0.95),
    ],
)
def test_every_scheduler_of_the_schema_has_its_own_course(
    make_model, examples, make_trainer, scheduler, first, last
):
    trainer = make_trainer(
        make_model(),
        examples[:10],
        batch_size=1,
        lr_scheduler=scheduler,
        learning_rate=1.0,
        optimizer="sgd",
        max_grad_norm=1e-3,
    )
    trainer.train()
    rates = [record["learning_rate"] for record in read_metrics(trainer.run_dir.metrics)]
    assert rates[0] == pytest.approx(first, abs=0.06)
    assert rates[-1] == pytest.approx(last, abs=0.06)


def test_warming_up_takes_its_share_of_the_updates(make_model, examples, make_trainer):
    trainer = make_trainer(
        make_model(),
        examples[:10],
        batch_size=1,
        lr_scheduler="constant_with_warmup",
        warmup_ratio=0.5,
        learning_rate=1.0,
        optimizer="sgd",
        max_grad_norm=1e-3,
    )
    trainer.train()
    rates = [record["learning_rate"] for record in read_metrics(trainer.run_dir.metrics)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[1] < 0.5
    assert rates[5:] == [1.0] * 5


def test_a_longer_gradient_is_cut_to_the_longest_allowed(make_model, examples, make_trainer):
    before, model = weights_of(make_model()), make_model()
    trainer = make_trainer(
        model, examples[:4], optimizer="sgd", learning_rate=1.0, max_grad_norm=0.01
    )
    trainer.train()
    moved = (weights_of(model) - before).norm().item()
    (record,) = read_metrics(trainer.run_dir.metrics)
    assert record["grad_norm"] > 0.1
    assert moved <= 0.01 * 1.5  # tied weights stand in the state twice
