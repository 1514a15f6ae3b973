"""An update on preferences is the formula over all of its rows, however it is cut up."""

import math

import pytest
import torch

from tests.training.conftest import checkpoint_every, weights_of
from tests.training.preference.conftest import LOSSES, answered, prompt_of, with_lora
from tests.training.test_resume import records, stop_by_signal
from yrunner.data.batching.answers import ComparedRows
from yrunner.data.batching.collate import all_in_one_row
from yrunner.data.conversation import RatedExample, TokenizedPair
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.preference import dpo_loss, log_odds
from yrunner.losses.token_weights import nlirg_entropy_weight
from yrunner.training.metrics import read_metrics

ONE_STEP = dict(optimizer="sgd", learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0)
TWO_STEPS = dict(gradient_accumulation_steps=2, **ONE_STEP)
CUTS = [(8, 1), (4, 2), (1, 8), (3, 3)]


def log_prob(model, example):
    """Of one answer: no padding, all logits, a look-up."""
    logits_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    places = example.target_positions
    labels = [example.labels[place] for place in places]
    return logits_TV.log_softmax(-1)[[place - 1 for place in places], labels].sum()


def log_s(x):
    return torch.nn.functional.logsigmoid(x)


def slow_loss(name, model, base, rows):
    """The loss of an update with these rows, from its definition."""
    section = LOSSES[name]
    if name == "kto":
        return slow_kto(section, model, base, rows)
    total, targets, likelihood = 0.0, 0, 0.0
    for pair in rows:
        sides = (pair.chosen, pair.rejected)
        own = [log_prob(model, side) for side in sides]
        with torch.no_grad():
            ratio = [mine - log_prob(base, side) for mine, side in zip(own, sides, strict=True)]
        ratio = [r + mine - mine.detach() for r, mine in zip(ratio, own, strict=True)]
        sizes = [len(side.target_positions) for side in sides]
        mean = [mine / size for mine, size in zip(own, sizes, strict=True)]
        if section.kind == "simpo":
            total -= log_s(section.beta * (mean[0] - mean[1]) - section.gamma)
        elif section.kind == "orpo":
            total -= mean[0] + section.beta * log_s(log_odds(mean[0]) - log_odds(mean[1]))
        else:
            if section.length == "mean":
                ratio = [r / size for r, size in zip(ratio, sizes, strict=True)]
            d, b, e = ratio[0] - ratio[1], section.beta, section.label_smoothing
            total += {
                "sigmoid": -log_s(b * d),
                "ipo": (d - 1 / (2 * b)) ** 2,
                "hinge": torch.relu(1 - b * d),
                "robust": (-(1 - e) * log_s(b * d) + e * log_s(-b * d)) / (1 - 2 * e),
                "conservative": -(1 - e) * log_s(b * d) - e * log_s(-b * d),
            }[section.form]
        likelihood, targets = likelihood + own[0], targets + sizes[0]
    return total / len(rows) - getattr(section, "sft", 0.0) * likelihood / targets


def slow_kto(section, model, base, rows):
    """KTO, each prompt beside the answer of the row before it, the first beside the last's."""
    longest = max(len(row.example.input_ids) for row in rows)
    with torch.no_grad():
        others = [
            answered(prompt_of(row.example), before.example, most=longest)
            for row, before in zip(rows, [rows[-1], *rows], strict=False)
        ]
        kl = sum(log_prob(model, other) - log_prob(base, other) for other in others) / len(rows)
    total = 0.0
    for row in rows:
        with torch.no_grad():
            known = log_prob(base, row.example)
        x = section.beta * (log_prob(model, row.example) - known - kl.clamp(min=0))
        sign, weight = (1, section.desirable_weight) if row.is_desirable else (-1, 1)
        total += weight * (1 - torch.sigmoid(sign * x))
    return total / len(rows)


def targets_of(model, example):
    """Log-probability and entropy of every target."""
    logits_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    places = example.target_positions
    log_TV = logits_TV.log_softmax(-1)[[place - 1 for place in places]]
    labels = [example.labels[place] for place in places]
    return log_TV[range(len(places)), labels], -(log_TV.exp() * log_TV).sum(-1)


@pytest.mark.parametrize("weigh", ["nlirg", "nlirg_entropy", "dft"])
@pytest.mark.parametrize("name", ["sigmoid", "mean", "ipo", "hinge", "robust", "conservative"])
def test_every_form_weighs_each_token_by_its_loss_under_the_reference(
    make_model, pairs, make_trainer, name, weigh
):
    curve = {
        "nlirg": lambda loss, _: nlirg_weight(loss),
        "nlirg_entropy": nlirg_entropy_weight,
        "dft": lambda loss, _: torch.exp(-loss),
    }[weigh]
    section = LOSSES[name].model_copy(update={"weigh": weigh, "sft": 0.3})
    base, rows = make_model().double(), pairs[:4]
    model = with_lora(make_model().double(), trained=True).double().eval()
    total, likelihood, targets = 0.0, 0.0, 0
    for pair in rows:
        sides = []
        for answer in (pair.chosen, pair.rejected):
            mine_N, _ = targets_of(model, answer)
            with torch.no_grad():
                base_N, entropy_N = targets_of(base, answer)
            weight_N = curve(-base_N, entropy_N)
            value = (weight_N * (mine_N - base_N)).sum()
            sides.append(value / weight_N.sum() if section.length == "mean" else value)
            if answer is pair.chosen:
                likelihood, targets = likelihood + mine_N.sum(), targets + len(mine_N)
        form = {"form": section.form, "label_smoothing": section.label_smoothing}
        total = total + dpo_loss(sides[0] - sides[1], beta=section.beta, **form)
    loss = total / len(rows) - 0.3 * likelihood / targets
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    trainer = make_trainer(model, rows, loss=section, batch_size=2, **TWO_STEPS)
    found = moved_by_one_step(trainer, model)
    (record,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-9)
    size = max(gradient.abs().max() for gradient in expected.values())
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-6, atol=1e-7 * size.item())


def rows_for(name, pairs, rated):
    return rated if name == "kto" else pairs


def moved_by_one_step(trainer, model):
    """What one step at a rate of 1 takes off each trained weight: its gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    return {name: weight - after[name].detach() for name, weight in before.items()}


@pytest.mark.parametrize(
    "shape",
    [
        *({"batch_size": size, "gradient_accumulation_steps": steps} for size, steps in CUTS),
        {"batch_size": 8, "layout": all_in_one_row},
        {
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "pack_to": 230,
            "layout": all_in_one_row,
        },
        {"batch_size": 4, "gradient_accumulation_steps": 2, "shares_prompts": True},
        {"batch_size": 8, "layout": all_in_one_row, "shares_prompts": True},
    ],
    ids=["8x1", "4x2", "1x8", "3x3", "one_row", "packed", "shared", "shared_in_one_row"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_an_update_is_that_of_its_formula(
    make_model, pairs, rated, make_trainer, name, shape
):
    rows = rows_for(name, pairs, rated)[:8]
    base = make_model().double()
    model = with_lora(make_model().double(), trained=True).double()
    loss = slow_loss(name, model.eval(), base, rows)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    trainer = make_trainer(model, rows, loss=name, **ONE_STEP, **shape)
    found = moved_by_one_step(trainer, model)
    (record,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-9)
    size = max(gradient.abs().max() for gradient in expected.values())
    assert size > 1e-4, "there must be something to learn"
    # The model rounds each of its norms to float32, and another layout sums in another order.
    atol = 10 * torch.finfo(torch.float32).eps * size.item()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", ["sigmoid_sft", "mean", "kto"])
def test_log_probabilities_that_are_known_beforehand_do_what_the_base_itself_does(
    make_model, pairs, rated, make_trainer, name
):
    """All weights are trained: the base is gone, and only its log-probabilities are left."""
    rows = rows_for(name, pairs, rated)[:8]
    base, model = make_model(seed=3).double(), make_model().double()
    slow_loss(name, model.eval(), base, rows).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compared = ComparedRows(rows, rated=name == "kto")
    with torch.no_grad():
        known = [log_prob(base, answer) for answer in compared.every_answer(range(8))]
    trainer = make_trainer(
        model,
        rows,
        loss=name,
        reference=[torch.stack(known).view(len(rows), -1)],
        batch_size=3,
        gradient_accumulation_steps=3,
        **ONE_STEP,
    )
    found = moved_by_one_step(trainer, model)
    size = max(gradient.abs().max() for gradient in expected.values()).item()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-6, atol=1e-7 * size)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_loss_is_the_logarithm_of_two_to_the_last_digit(
    make_model, pairs, make_trainer, dropout
):
    trainer = make_trainer(with_lora(make_model(), dropout=dropout), pairs, batch_size=5)
    trainer.train()
    first = read_metrics(trainer.run_dir.metrics)[0]
    assert first["loss"] == math.log(2)
    assert first["reward_accuracy"] == 0.5 and first["reward_margin"] == 0
    assert first["chosen_log_ratio"] == first["rejected_log_ratio"] == 0


def test_swapped_pairs_have_the_negated_margin(make_model, pairs, make_trainer):
    swapped = [TokenizedPair(pair.rejected, pair.chosen) for pair in pairs]
    found = []
    for number, rows in enumerate((pairs, swapped)):
        model = with_lora(make_model(), trained=True)
        trainer = make_trainer(model, pairs[:2], rows, folder=f"run-{number}", batch_size=4)
        found.append(trainer.objective.validate(model, trainer.batches.of_validation()))
    right, wrong = found
    assert right["eval_reward_margin"] == -wrong["eval_reward_margin"] != 0
    assert right["eval_reward_accuracy"] + wrong["eval_reward_accuracy"] == 1


@pytest.mark.parametrize("sides", [(True,), (False,), (True, False)])
def test_kto_learns_row_by_row_and_from_one_side_alone(make_model, rated, make_trainer, sides):
    rows = [row for row in rated if row.is_desirable in sides][:6]
    model = with_lora(make_model())
    trainer = make_trainer(
        model, rows, rows, loss="kto", batch_size=1, epochs=3, learning_rate=1e-2
    )
    trainer.train()
    logged = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    assert len(logged) == 18 and all(row["answers"] == 1 for row in logged)
    assert all(("chosen_loss" in row) != ("rejected_loss" in row) for row in logged)
    chosen, rejected = (
        [row[f"{side}_log_ratio"] for row in logged[-6:] if f"{side}_log_ratio" in row]
        for side in ("chosen", "rejected")
    )
    assert len(chosen) == sum(row.is_desirable for row in rows)
    if chosen and rejected:
        assert sum(chosen) / len(chosen) > sum(rejected) / len(rejected) + 0.1
    else:
        assert all(ratio > 0.1 for ratio in chosen) and all(ratio < -0.1 for ratio in rejected)


def test_a_validation_does_not_depend_on_its_batches(make_model, pairs, rated, make_trainer):
    for name in ("sigmoid_sft", "simpo", "kto"):
        rows, found = rows_for(name, pairs, rated), []
        for size in (1, 7, 20):
            model = with_lora(make_model(), trained=True)
            trainer = make_trainer(model, rows[:2], rows, loss=name, batch_size=size)
            found.append(trainer.objective.validate(model, trainer.batches.of_validation()))
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "kto"])
@pytest.mark.parametrize("lora", [True, False])
def test_resume_changes_nothing(make_model, pairs, rated, make_trainer, name, lora):
    """Stopped in the middle of an epoch and resumed in new objects: equal bit for bit."""
    rows = rows_for(name, pairs, rated)

    def run(folder):
        model = with_lora(make_model(), dropout=0.3) if lora else make_model()
        reference = None
        if not lora:
            parts = [ComparedRows(part, rated=name == "kto") for part in (rows[4:], rows[:4])]
            reference = [
                torch.linspace(-90, -80, 2 * len(part)).double().view(len(part), -1)
                for part in parts
            ]
        trainer = make_trainer(
            model,
            rows[4:],
            rows[:4],
            loss=name,
            reference=reference,
            folder=folder,
            lr_scheduler="cosine",
            batch_size=2,
            gradient_accumulation_steps=2,
            epochs=2,
            learning_rate=1e-2,
            checkpoint=checkpoint_every(3, keep=10),
            log_every=2,
        )
        return model, trainer

    undisturbed, trainer = run("undisturbed")
    trainer.train()
    _, stopped = run("stopped")
    assert stop_by_signal(stopped, 4) == 4, "the update that was begun is cut off"
    resumed, again = run("stopped")
    again.train(again.run_dir.checkpoint(4))
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert records(trainer) == records(again), "no gaps, no doubles, the same sums"


def test_a_probe_of_the_memory_leaves_a_run_as_it_is(
    make_model, pairs, rated, make_trainer, monkeypatch
):
    """Forward, backward and a validation of the largest batch, as before a long run."""
    for name in ("sigmoid", "kto"):
        rows, reached = rows_for(name, pairs, rated), []
        for worth_it in (10_000, 0):
            monkeypatch.setattr("yrunner.training.memory.oom_probe.WORTH_IT", worth_it)
            model = with_lora(make_model(), dropout=0.3)
            trainer = make_trainer(
                model,
                rows[4:],
                rows[:4],
                loss=name,
                folder=f"{name}-{worth_it}",
                learning_rate=1e-2,
            )
            trainer.train()
            reached.append((weights_of(model), records(trainer)))
        assert torch.equal(reached[0][0], reached[1][0])
        assert reached[0][1] == reached[1][1]


def test_prompts_meet_answers_to_other_prompts(pairs):
    """Rows made of pairs are neighbours with one prompt: the row before is no other prompt."""
    rows = [
        RatedExample(side, is_chosen)
        for pair in pairs
        for side, is_chosen in ((pair.chosen, True), (pair.rejected, False))
    ]
    compared = ComparedRows(rows, rated=True)
    for number, row in enumerate(rows):
        other = compared[number, 0].other
        prompt = prompt_of(row.example)
        assert other.input_ids[: len(prompt)] == prompt
        partner = rows[number - 1 - number % 2].example
        assert prompt_of(partner) != prompt
        end = len(other.input_ids) - len(prompt)
        assert other.input_ids[len(prompt) :] == partner.input_ids[len(prompt_of(partner)) :][:end]
        assert len(other.input_ids) <= max(len(row.example.input_ids) for row in rows)


def test_with_one_prompt_any_other_answer_serves(pairs):
    prompt = prompt_of(pairs[0].chosen)
    rows = [RatedExample(answered(prompt, pair.chosen), True) for pair in pairs[:3]]
    compared = ComparedRows(rows, rated=True)
    others = [compared[number, 0].other.input_ids for number in range(3)]
    assert others == [rows[number - 1].example.input_ids for number in range(3)]
