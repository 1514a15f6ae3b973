"""`yrun train` on preferences, from pairs to a model that prefers the better answers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.commands.conftest import records
from yrunner.commands.check.command import check
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train


def run(*overrides, resume=False, overwrite=False):
    train(Path("preferred.yaml"), list(overrides), resume=resume, overwrite=overwrite)


def weights(name="preferred"):
    """The result, an adapter beside its base, as the logits of some tokens."""
    model = AutoModelForCausalLM.from_pretrained(f"outputs/{name}/model")
    with torch.no_grad():
        return model(torch.arange(1, 40)[None]).logits


def test_an_adapter_learns_which_answers_are_better(preferred, capfd):
    run()
    said = capfd.readouterr().out
    assert "reference" in said and "the base, adapter off" in said
    assert "reward accuracy" in said
    first, *_, last = [row for row in records() if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["pairs"] == 8
    assert last["loss"] < 0.6 and last["reward_accuracy"] > 0.9 and last["reward_margin"] > 0
    validations = [row for row in records() if "eval_loss" in row]
    assert validations[-1]["eval_reward_accuracy"] == 1
    assert weights().isfinite().all()
    page = Path("outputs/preferred/report.html").read_text("utf-8")
    assert "Rewards" in page and "Weight by loss" not in page


@pytest.mark.parametrize(
    "loss",
    [
        "{kind: dpo, form: ipo, length: mean, beta: 0.5}",
        "{kind: dpo, sft: 0.5}",
        "{kind: simpo}",
        "{kind: orpo}",
        "{kind: kto}",
    ],
)
@pytest.mark.parametrize("tuning", ["{kind: full}", "{kind: freeze, train_top: 0.5}"])
def test_without_an_adapter_the_answers_are_scored_once_before(preferred, capfd, loss, tuning):
    if tuning != "{kind: full}" and "dpo, sft" not in loss:
        pytest.skip("one loss is enough")
    run(f"loss={loss}", f"tuning={tuning}", "train.learning_rate=1e-3")
    said = capfd.readouterr().out
    has_reference = "kto" in loss or "dpo" in loss
    assert ("every answer is scored once before training" in said) == has_reference
    rows = [row for row in records() if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in rows)
    if has_reference:
        assert abs(rows[0]["chosen_log_ratio"]) < 1e-4
        assert abs(rows[-1]["chosen_log_ratio"]) > 1e-2
    run(f"loss={loss}", f"tuning={tuning}", "train.learning_rate=1e-3", overwrite=True)
    said = capfd.readouterr().out
    assert ("reference: 16 rows, scored before" in said) == ("dpo" in loss), said
    again = [row for row in records() if "loss" in row]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_a_run_that_continues_an_adapter_has_that_adapter_as_its_reference(preferred, capfd):
    """Not the base beneath it: the first loss would not be ln 2, the first accuracy 1."""
    run("name=first")
    capfd.readouterr()
    adapter = Path("outputs/first/model").resolve()
    # Rounding of the answers in other batches is all that differs.
    run(f"tuning={{kind: lora, adapter: {adapter}}}")
    assert "the model with the adapter that it starts from" in capfd.readouterr().out
    first = next(row for row in records() if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["chosen_log_ratio"]) < 1e-4
    # The adapter of the folder is trained anew: the answers are scored anew.
    run("name=first", "train.learning_rate=2e-2", overwrite=True)
    capfd.readouterr()
    run(f"tuning={{kind: lora, adapter: {adapter}}}", overwrite=True)
    assert "scored before" not in capfd.readouterr().out
    first = next(row for row in records() if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "addition",
    [
        "data.packing=true",
        "train.order=as_written",
        "train.gradient_checkpointing=true",
        "keep={kind: rows, file: train.jsonl, share: 0.25}",
        "keep={kind: ewc, file: train.jsonl}",
        "train.trackers=[tensorboard]",
        "train.early_stopping={patience: 1}",
        "tuning={kind: lora, variant: dora, dropout: 0.1}",
        "data.validation=[]",
        "data.max_length=200",
        "tuning={kind: qlora, rank: 4, alpha: 8}",
    ],
)
def test_what_other_stages_have_works_here_too(preferred, addition):
    run(addition, "train.epochs=1")
    first = next(row for row in records() if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["reward_accuracy"] == 0.5


def test_check_says_what_the_reference_is_and_what_the_base_prefers(preferred, capfd):
    check(Path("preferred.yaml"), [], as_machine=False)
    said = capfd.readouterr().out
    assert "reference: the base, adapter off: one more forward pass per update" in said
    assert re.search(r"longer wins: \d+\.\d%", said)
    assert re.search(r"the base prefers the better answer in \d+\.\d% of 16 pairs", said)
    assert "every target has the weight 1" not in said
    check(Path("preferred.yaml"), ["tuning={kind: full}"], as_machine=True, sample=4)
    facts = json.loads(capfd.readouterr().out)
    assert facts["reference"].startswith("the base: every answer is scored once before training")
    assert facts["signal"]["base_wins"]["pairs"] == 2
    check(Path("preferred.yaml"), ["loss={kind: simpo}"], as_machine=True, sample=0)
    assert json.loads(capfd.readouterr().out)["reference"] is None


def test_a_beta_that_is_far_too_small_for_means_gets_a_warning(preferred, capfd):
    small = "loss={kind: dpo, length: mean, beta: 0.1}"
    check(Path("preferred.yaml"), [small], as_machine=False, sample=0)
    assert "loss.beta 0.1 is small for loss.length: mean" in "".join(capfd.readouterr())
    run(small, "train.max_steps=1")
    assert "loss.beta 0.1 is small for loss.length: mean" in "".join(capfd.readouterr())
    run("loss={kind: dpo, length: mean, beta: 2}", "train.max_steps=1", overwrite=True)
    assert "is small for" not in "".join(capfd.readouterr())


def test_pairs_are_answers_for_kto(preferred):
    run("loss={kind: kto}", "train.batch_size=1")
    rows = [row for row in records() if "loss" in row]
    assert sum(row["answers"] for row in rows) == 2 * 2 * 16
    assert all(row["kl_estimate"] >= 0 for row in rows)


def test_a_merged_result_answers_as_its_parts(preferred):
    run()
    merge(Path("preferred.yaml"), [])
    merged = next(Path("outputs/preferred").glob("merged*"))
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(logits, weights(), rtol=1e-3, atol=1e-4)
