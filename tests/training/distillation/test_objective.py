"""An update on labels and a teacher is the formula over all of its targets, however it is cut."""

import pytest
import torch

from tests.losses.test_distillation import slow
from tests.training.conftest import LOSSES, checkpoint_every, weights_of
from tests.training.preference.conftest import with_lora
from tests.training.preference.test_objective import ONE_STEP, moved_by_one_step
from tests.training.test_resume import records, stop_by_signal
from yrunner.data.batching.collate import all_in_one_row
from yrunner.data.batching.taught import UPDATE, is_drawn, prompt_of_last_answer
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.distillation import TeacherDivergence
from yrunner.losses.fused_head import attach
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import token_weight
from yrunner.training.metrics import read_metrics

MEASURES = {
    "forward_kl": TeacherDivergence(),
    "reverse_kl_at_2": TeacherDivergence("reverse_kl", temperature=2.0),
    "jsd_0.3": TeacherDivergence("jsd", beta=0.3),
}
SHAPES = {
    "8x1": {"batch_size": 8},
    "4x2": {"batch_size": 4, "gradient_accumulation_steps": 2},
    "1x8": {"batch_size": 1, "gradient_accumulation_steps": 8},
    "3x3": {"batch_size": 3, "gradient_accumulation_steps": 3},
    "one_row": {"batch_size": 8, "layout": all_in_one_row},
    "packed": {
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "pack_to": 160,
        "layout": all_in_one_row,
    },
}


def logits_of(model, example):
    """Before each target: no padding, all logits."""
    places = torch.tensor(example.target_positions)
    return model(input_ids=torch.tensor([example.input_ids])).logits[0][places - 1]


def slow_update(model, teacher, rows, divergence, *, share=0.5, loss="plain", weighs=False):
    """The loss of an update with these rows, from its definition, and its mean divergence."""
    weight = token_weight(LOSSES[loss])[0]
    labels, taught, targets = 0.0, 0.0, 0
    distance = 0.0
    for row in rows:
        own_NV = logits_of(model, row)
        with torch.no_grad():
            theirs_NV = logits_of(teacher, row)
        ids = torch.tensor([row.labels[place] for place in row.target_positions])
        loss_N = torch.nn.functional.cross_entropy(own_NV, ids, reduction="none")
        log_NV = own_NV.detach().log_softmax(-1)
        weight_N = weight.of(loss_N.detach(), -(log_NV.exp() * log_NV).sum(-1))
        divergence_N = slow(divergence, own_NV, theirs_NV)
        labels = labels + (weight_N * loss_N).sum()
        taught = taught + ((weight_N if weighs else 1) * divergence_N).sum()
        distance += divergence_N.detach().sum()
        targets += len(ids)
    squared = divergence.temperature**2
    total = (1 - share) * labels / targets + share * squared * taught / targets
    return total, float(distance / targets)


def check_one_step(trainer, model, expected):
    found = moved_by_one_step(trainer, model)
    size = max(gradient.abs().max() for gradient in expected.values())
    assert size > 1e-4, "there must be something to learn"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7 * size.item())
    (record,) = [row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row]
    return record


def gradients_of(model, loss):
    loss.backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return trained


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", MEASURES)
def test_the_gradient_of_an_update_is_that_of_its_formula(
    make_model, examples, teacher, make_trainer, name, shape
):
    rows, divergence = examples[:8], MEASURES[name]
    model = with_lora(make_model().double(), trained=True).double()
    total, distance = slow_update(model.eval(), teacher.double(), rows, divergence, share=0.3)
    expected = gradients_of(model, total)
    trainer = make_trainer(model, rows, divergence=divergence, share=0.3, **ONE_STEP, **shape)
    record = check_one_step(trainer, model, expected)
    assert record["teacher_divergence"] == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("weighs", [False, True])
def test_the_weights_of_nlirg_count_for_the_teacher_where_they_should(
    make_model, examples, teacher, make_trainer, weighs
):
    rows, divergence = examples[:8], MEASURES["jsd_0.3"]
    model = make_model().double()
    total, _ = slow_update(
        model.eval(), teacher.double(), rows, divergence, loss="nlirg", weighs=weighs
    )
    expected = gradients_of(model, total)
    trainer = make_trainer(
        model,
        rows,
        divergence=divergence,
        loss="nlirg",
        weigh_teacher=weighs,
        batch_size=4,
        gradient_accumulation_steps=2,
        **ONE_STEP,
    )
    check_one_step(trainer, model, expected)


def test_an_update_divided_by_its_weights_divides_both_parts(
    make_model, examples, teacher, make_trainer
):
    """2 x 4 rows as 8 x 1: the sum of the weights is of the whole update."""
    found = []
    for shape in ("8x1", "4x2"):
        model = make_model().double()
        trainer = make_trainer(
            model,
            examples[:8],
            loss="nlirg_by_weights",
            weigh_teacher=True,
            folder=shape,
            **ONE_STEP,
            **SHAPES[shape],
        )
        teacher.double()
        found.append(moved_by_one_step(trainer, model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", MEASURES)
def test_all_likeliest_tokens_on_disk_teach_as_the_teacher_in_memory(
    make_model, examples, teacher, stored, make_trainer, name
):
    rows, divergence = examples[:8], MEASURES[name]
    known = stored(rows, len(teacher.lm_head.weight), temperature=divergence.temperature)
    found = []
    for predictions in (None, known):
        model = make_model()
        trainer = make_trainer(
            model,
            rows,
            divergence=divergence,
            known=predictions,
            folder=f"known-{predictions is not None}",
            **ONE_STEP,
            **SHAPES["packed"],
        )
        found.append(moved_by_one_step(trainer, model))
    for weight, gradient in found[0].items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[1][weight], gradient, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("known", [False, True])
def test_token_batches_learn_the_same_targets_from_the_teacher(
    make_model, examples, teacher, stored, make_trainer, known
):
    """At a rate of zero, the groups of all rows together have the divergence of the rows."""
    rows = examples[:6]
    model = make_model()
    _, distance = slow_update(model.eval(), teacher, rows, TeacherDivergence())
    trainer = make_trainer(
        model,
        rows,
        known=stored(rows, len(teacher.lm_head.weight)) if known else None,
        token_batch=5,
        batch_size=3,
        learning_rate=1e-30,
    )
    trainer.train()
    found = [(row["teacher_divergence"], row["targets"]) for row in records(trainer)]
    assert len(found) > 4 and sum(targets for _, targets in found) == sum(
        len(row.target_positions) for row in rows
    )
    mean = sum(each * targets for each, targets in found) / sum(targets for _, targets in found)
    assert mean == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("known", [False, True])
def test_a_validation_has_the_divergence_of_its_own_rows(
    make_model, examples, teacher, stored, make_trainer, known
):
    train, validation = examples[:6], examples[6:11]
    model = make_model()
    predictions = stored([*train, *validation], len(teacher.lm_head.weight)) if known else None
    trainer = make_trainer(model, train, validation, known=predictions, batch_size=3)
    found = trainer.validate()
    _, distance = slow_update(model.eval(), teacher, validation, TeacherDivergence())
    assert found["eval_teacher_divergence"] == pytest.approx(distance, rel=1e-4)
    assert found["eval_targets"] == sum(len(row.target_positions) for row in validation)


@pytest.mark.parametrize("mode", ["live", "known", "on_policy"])
@pytest.mark.parametrize("lora", [True, False])
def test_resume_changes_nothing(make_model, examples, teacher, stored, make_trainer, mode, lora):
    """Stopped in the middle of an epoch and resumed in new objects: equal bit for bit."""
    train, validation = examples[4:20], examples[:4]

    def run(folder):
        model = with_lora(make_model(), dropout=0.3) if lora else make_model()
        trainer = make_trainer(
            model,
            train,
            validation,
            divergence=MEASURES["jsd_0.3"],
            known=stored([*train, *validation], 8) if mode == "known" else None,
            on_policy=0.5 if mode == "on_policy" else 0.0,
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
    assert all("teacher_divergence" in row for row in records(trainer) if "loss" in row)


def written_batches(trainer, update=0):
    """The micro-batches of an update after the student has written."""
    batches = trainer.batches.of_updates(update)
    found = [next(batches) for _ in range(trainer.batches.per_update)]
    trainer.model.to(trainer.device)
    trainer.objective.begin_update(trainer.model, found, trainer.device)
    return found


def test_written_answers_have_no_label_and_the_others_no_change(
    make_model, make_talker, examples, make_trainer
):
    trainer = make_trainer(make_talker(), examples[:8], on_policy=0.5, batch_size=8)
    (batch,) = written_batches(trainer)
    drawn = {row for row in range(8) if is_drawn(0, 0, row, 0.5)}
    assert 0 < len(drawn) < 8
    is_label = iter(batch["is_label_N"].tolist())
    for (row, _, number), ids, labels in zip(
        batch["places_E3"].tolist(), batch["input_ids"], batch["labels"], strict=True
    ):
        own = examples[row]
        marks = [next(is_label) for _ in range(number)]
        assert marks == [row not in drawn] * number
        prompt = prompt_of_last_answer(own)
        assert ids[: len(prompt)].tolist() == prompt
        if row in drawn:
            assert 1 <= number <= 12
            assert labels[: len(prompt)].tolist() == [IGNORE_INDEX] * len(prompt)
        else:
            assert ids[: len(own.input_ids)].tolist() == own.input_ids


def test_what_the_student_writes_is_learned_from_the_teacher_alone(
    make_talker, examples, teacher, make_trainer
):
    model, rows, divergence = make_talker(), examples[:8], MEASURES["jsd_0.3"]
    share = 0.4
    options = dict(divergence=divergence, share=share, on_policy=0.5, **ONE_STEP)
    trainer = make_trainer(model, rows, batch_size=8, **options)
    (batch,) = written_batches(trainer)
    is_label_N = batch["is_label_N"]
    losses, distances = [], []
    attach(model)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        row = TokenizedExample(ids.tolist(), labels.tolist(), rows[0].origin)
        own_NV = logits_of(model.eval(), row)
        targets = torch.tensor([row.labels[place] for place in row.target_positions])
        losses.append(torch.nn.functional.cross_entropy(own_NV, targets, reduction="none"))
        with torch.no_grad():
            theirs_NV = logits_of(teacher, row)
        distances.append(slow(divergence, own_NV, theirs_NV))
    of_labels = torch.cat(losses)[is_label_N].mean()
    loss = (1 - share) * of_labels + share * torch.cat(distances).mean()
    expected = gradients_of(model, loss)
    found = moved_by_one_step(make_trainer(model, rows, batch_size=8, **options), model)
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * size + 1e-7)


def test_answers_do_not_depend_on_how_an_update_is_cut_up_or_shared(
    make_talker, examples, make_trainer
):
    def answers(batches):
        return {
            batch["places_E3"][place, 0].item(): [
                token
                for token, label in zip(ids.tolist(), labels.tolist(), strict=True)
                if label != IGNORE_INDEX
            ]
            for batch in batches
            for place, (ids, labels) in enumerate(
                zip(batch["input_ids"], batch["labels"], strict=True)
            )
        }

    def write(folder, update=0, **shape):
        model = make_talker().double()
        options = dict(on_policy=1.0, share=1.0, epochs=2, folder=folder)
        return answers(
            written_batches(make_trainer(model, examples[:8], **options, **shape), update)
        )

    whole = write("whole", batch_size=8)
    four = dict(batch_size=2, gradient_accumulation_steps=4)
    assert write("cut", **four) == whole
    assert write("first", rank=(0, 2), **four) | write("second", rank=(1, 2), **four) == whole
    later = write("later", update=1, batch_size=8)
    assert later.keys() == whole.keys() and later != whole, "each update draws anew"


def test_every_micro_batch_knows_its_update(make_model, examples, make_trainer):
    trainer = make_trainer(
        make_model(), examples[:8], batch_size=1, gradient_accumulation_steps=2, epochs=2
    )
    found = [int(batch[UPDATE]) for batch in trainer.batches.of_updates(0)]
    assert found == [number // 2 for number in range(16)]
    assert [int(batch[UPDATE]) for batch in trainer.batches.of_updates(5)] == found[10:]


@pytest.mark.parametrize(
    ("labels", "length"),
    [
        ([-100, -100, 5, 6], 2),
        ([-100, 5, 6, -100, -100, 7, 8], 5),
        ([-100, 5, -100, 6, -100, 7, -100], 5),
        ([-100, 5, 6, 7], 1),
    ],
    ids=["one_answer", "two_answers", "three_answers", "short_prompt"],
)
def test_the_prompt_of_the_last_answer_is_everything_before_it(examples, labels, length):
    ids = list(range(len(labels)))
    example = TokenizedExample(ids, labels, examples[0].origin)
    assert prompt_of_last_answer(example) == ids[:length]


def test_a_probe_of_the_memory_leaves_a_run_as_it_is(
    make_model, examples, make_trainer, monkeypatch
):
    reached = []
    for worth_it in (10_000, 0):
        monkeypatch.setattr("yrunner.training.memory.oom_probe.WORTH_IT", worth_it)
        model = with_lora(make_model(), dropout=0.3)
        trainer = make_trainer(
            model,
            examples[4:12],
            examples[:4],
            on_policy=0.5,
            folder=f"probe-{worth_it}",
            learning_rate=1e-2,
        )
        trainer.train()
        reached.append((weights_of(model), records(trainer)))
    assert torch.equal(reached[0][0], reached[1][0])
    assert reached[0][1] == reached[1][1]


def test_a_student_that_follows_its_teacher_comes_closer(make_model, examples, make_trainer):
    trainer = make_trainer(
        make_model(), examples[:16], share=1.0, batch_size=8, epochs=20, learning_rate=1e-2
    )
    trainer.train()
    found = [row["teacher_divergence"] for row in records(trainer) if "loss" in row]
    assert found[-1] < 0.5 * found[0]
