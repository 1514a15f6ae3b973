"""Which losses over pairs a recipe takes, and what it refuses beside them."""

import pytest


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        ("preference", "{kind: dpo}"),
        ("preference", "{kind: dpo, form: ipo, beta: 0.5, length: mean, sft: 0.2}"),
        ("preference", "{kind: dpo, form: robust, label_smoothing: 0.1}"),
        ("preference", "{kind: dpo, form: conservative, label_smoothing: 0.49}"),
        ("preference", "{kind: simpo, beta: 2, gamma: 0}"),
        ("preference", "{kind: orpo}"),
        ("preference", "{kind: kto, desirable_weight: 1.33, undesirable_weight: 0}"),
        ("reward", "{kind: bradley_terry, margin: 0.5, center: 0.01}"),
    ],
)
def test_each_stage_takes_its_losses(stage, loss, valid, problems):
    assert problems(f"{valid}train: {{stage: {stage}}}\nloss: {loss}\n") == []


@pytest.mark.parametrize(
    ("stage", "loss", "expected"),
    [
        (
            "preference",
            "",
            "preference learns from pairs, and loss.kind plain from tokens; set loss",
        ),
        ("preference", "{kind: nlirg}", "set loss.kind to dpo, simpo, orpo or kto"),
        ("preference", "{kind: bradley_terry}", "bradley_terry belongs to train.stage reward"),
        ("reward", "{kind: dpo}", "train.stage reward needs loss.kind bradley_terry, not dpo"),
        ("reward", "", "train.stage reward needs loss.kind bradley_terry, not plain"),
        ("sft", "{kind: dpo}", "loss.kind dpo belongs to train.stage preference; set that"),
        ("cpt", "{kind: kto}", "loss.kind kto belongs to train.stage preference; set that"),
        ("sft", "{kind: bradley_terry}", "bradley_terry belongs to train.stage reward; set that"),
        ("preference", "{kind: dpo, label_smoothing: 0.1}", "form sigmoid has no label_smoothing"),
        ("preference", "{kind: dpo, form: robust}", "form robust needs label_smoothing"),
        ("preference", "{kind: dpo, form: sigmod}", 'did you mean "sigmoid"?'),
        ("preference", "{kind: dpo, beta: 0}", "must be a number above 0, got 0"),
        ("preference", "{kind: dpo, gamma: 1}", "only kinds ppo and simpo have this key, not dpo"),
        (
            "preference",
            "{kind: dpo, form: robust, label_smoothing: 0.5}",
            "must be a number of at least 0 and below 0.5, got 0.5",
        ),
        (
            "preference",
            "{kind: kto, desirable_weight: 0, undesirable_weight: 0}",
            "are both 0: nothing is learned; raise one",
        ),
    ],
)
def test_a_loss_of_another_stage_is_refused(stage, loss, expected, valid, problems):
    text = f"{valid}train: {{stage: {stage}}}\n" + (f"loss: {loss}\n" if loss else "")
    (found,) = problems(text)
    assert expected in found


def test_prompts_are_no_targets(valid, problems):
    text = valid.replace("data:", "data:\n  targets: all", 1)
    (found,) = problems(f"{text}train: {{stage: preference}}\nloss: {{kind: dpo}}\n")
    assert "data.targets: all and train.stage preference cannot be combined" in found


def test_answers_are_not_cut_into_token_batches(valid, problems):
    (found,) = problems(
        f"{valid}train: {{stage: preference, token_batch: 8}}\nloss: {{kind: dpo}}\n"
    )
    assert "token_batch: answers are compared as a whole" in found
