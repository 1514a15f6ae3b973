"""`yrun train` of a reward model, which loads as a classifier of transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.commands.conftest import PREFERRED, records
from tests.conftest import write_jsonl
from tests.project import SCRATCH, write_recipe
from yrunner.assembly.run import Run
from yrunner.commands.check.command import check
from yrunner.commands.compare.command import compare
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.errors import ModelError, RecipeError, RunError, YRunnerError
from yrunner.evaluation import tasks
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.models import reward
from yrunner.recipe.schema.eval import RewardTask

REWARD = PREFERRED | {
    "name": "reward",
    "loss": {"kind": "bradley_terry", "center": 0.01},
    "train": PREFERRED["train"] | {"stage": "reward", "epochs": 4},
}

LIKED = {
    "name": "liked",
    "kind": "reward",
    "side": "domain",
    "reward_model": "outputs/reward/model",
    "max_new_tokens": 8,
}


@pytest.fixture
def rewarding(preferred):
    """A folder with a trained base, pairs, and a recipe of a reward model."""
    write_recipe(preferred / "reward.yaml", REWARD)
    return preferred


def run(*overrides, resume=False, overwrite=False):
    train(Path("reward.yaml"), list(overrides), resume=resume, overwrite=overwrite)


def scores_of(classifier, examples):
    with torch.no_grad():
        return [classifier(torch.tensor([each.input_ids])).logits.item() for each in examples]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.packing=true", "train.learning_rate=2e-2"],
        ["tuning={kind: full}"],
        ["tuning={kind: freeze, train_top: 0.5}"],
        ["loss={kind: bradley_terry, margin: 0.5}", "train.gradient_checkpointing=true"],
    ],
)
def test_the_result_is_a_classifier_that_scores_better_answers_higher(rewarding, overrides, capfd):
    run(*overrides)
    validations = [row for row in records("reward") if "eval_loss" in row]
    assert validations[-1]["eval_reward_accuracy"] == 1
    assert "AutoModelForSequenceClassification" in capfd.readouterr().out
    folder = "outputs/reward/model"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert classifier.config.pad_token_id == tokenizer.pad_token_id
    trained = Run.load(Path("reward.yaml"), overrides)
    pairs = list(trained.pairs.validation)
    better, worse = (
        scores_of(classifier, [getattr(pair, side) for pair in pairs])
        for side in ("chosen", "rejected")
    )
    margins = [ours - theirs for ours, theirs in zip(better, worse, strict=True)]
    assert min(margins) > 0
    # What was measured in training is what the loaded classifier computes, padded or alone.
    best = min(validations, key=lambda row: row["eval_loss"])
    assert sum(margins) / len(margins) == pytest.approx(best["eval_reward_margin"], rel=1e-3)
    rows = [pair.chosen.input_ids for pair in pairs]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    padded = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows])
    with torch.no_grad():
        together = classifier(padded, attention_mask=(padded != pad).long()).logits[:, 0].tolist()
    assert together == pytest.approx(better, rel=1e-3, abs=1e-4)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
"""Weights are quantized in blocks of 64."""


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_through_a_quantized_base_the_result_is_a_classifier_of_plain_weights(
    rewarding, change, quant_type
):
    scratch = {**SCRATCH, "config": {**SCRATCH["config"], **WIDE}}
    change("base.yaml", model__scratch=scratch, train__epochs=1)
    overrides = [f"tuning={{kind: qlora, rank: 4, alpha: 8, quant_type: {quant_type}}}"]
    run(*overrides)
    validations = [row for row in records("reward") if "eval_loss" in row]
    assert validations[-1]["eval_reward_accuracy"] == 1
    classifier = AutoModelForSequenceClassification.from_pretrained("outputs/reward/model")
    assert not getattr(classifier.config, "quantization_config", None)
    assert all(weight.is_floating_point() for weight in classifier.state_dict().values())
    pairs = list(Run.load(Path("reward.yaml"), overrides).pairs.validation)
    better, worse = (
        scores_of(classifier, [getattr(pair, side) for pair in pairs])
        for side in ("chosen", "rejected")
    )
    best = min(validations, key=lambda row: row["eval_loss"])
    # 8-bit layers round their inputs too.
    tolerance = 1e-2 if quant_type == "nf4" else 5e-2
    margin = (sum(better) - sum(worse)) / len(pairs)
    assert margin == pytest.approx(best["eval_reward_margin"], rel=tolerance)


def test_accumulation_and_packing_change_no_reward_model(rewarding):
    found = []
    for size, steps, packing in ((8, 1, False), (1, 8, False), (2, 4, False), (4, 4, True)):
        run(
            "tuning={kind: full}",
            f"train.batch_size={size}",
            f"train.gradient_accumulation_steps={steps}",
            f"data.packing={str(packing).lower()}",
            "train.epochs=1",
            "train.optimizer=sgd",
            "train.learning_rate=0.1",
            overwrite=bool(found),
        )
        found.append([row["loss"] for row in records("reward") if "loss" in row])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[3][0] == pytest.approx(sum(found[0]) / 2, rel=0.05), "all rows in one update"


def test_of_sharded_weights_the_classifier_is_that_of_one_process(rewarding, forks):
    """One process makes it, from weights that ZeRO stage 3 has sharded."""
    learned = ["train.epochs=1", "train.optimizer=sgd", "train.learning_rate=0.1"]
    run(*learned)
    alone = AutoModelForSequenceClassification.from_pretrained("outputs/reward/model")
    sharded = ["distributed.processes=2", "distributed.deepspeed={stage: 3}"]
    run(*learned, *sharded, "name=sharded", "train.batch_size=2")
    found = AutoModelForSequenceClassification.from_pretrained("outputs/sharded/model")
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_what_a_reward_model_cannot_do_is_said_in_one_sentence(rewarding):
    run("train.max_steps=1")
    with pytest.raises(RunError, match="reward is a reward model, which scores answers and writes"):
        merge(Path("reward.yaml"), [])
    with pytest.raises(YRunnerError, match="makes a reward model, which answers no questions"):
        compare(Path("reward.yaml"), [], vary="train.learning_rate=1e-3,1e-4")
    with pytest.raises(ModelError, match="ForSequenceClassification, which does not predict"):
        train(
            Path("preferred.yaml"),
            ["model.base=outputs/reward/model"],
            resume=False,
            overwrite=False,
        )
    for override, sentence in (
        ("keep={kind: self_replay}", "keep.kind self_replay: a reward model writes nothing"),
        (
            "tuning={kind: lora, adapter: outputs/reward/model}",
            "tuning.adapter: that of a language model has no score. Run yrun merge",
        ),
        (
            "train.early_stopping={metric: drift}",
            "early_stopping.metric drift: a reward model predicts no tokens. Use eval_loss",
        ),
    ):
        with pytest.raises(RecipeError, match=sentence):
            run(override)


def test_a_base_without_a_classifier_is_refused_before_training(rewarding, monkeypatch):
    monkeypatch.setattr(reward, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    for command in (run, lambda: check(Path("reward.yaml"), [], as_machine=False, sample=0)):
        with pytest.raises(ModelError, match="no ForSequenceClassification for qwen3 models"):
            command()
    assert not Path("outputs/reward").exists()


def test_a_reward_model_resumes(rewarding):
    """Ended early and continued: as if it had run through."""
    overrides = ["train.epochs=2", "train.lr_scheduler=constant", "train.warmup_ratio=0"]
    run(*overrides)
    whole = AutoModelForSequenceClassification.from_pretrained("outputs/reward/model")
    run(*overrides, "name=parts", "train.epochs=1")
    # A finished run is not resumed: what it saved last is taken away, as if it had been killed.
    for path in ("model", "report.html", "after.json", "result.json"):
        place = Path("outputs/parts", path)
        for file in sorted(place.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        place.rmdir() if place.is_dir() else place.unlink()
    run(*overrides, "name=parts", resume=True)
    parts = AutoModelForSequenceClassification.from_pretrained("outputs/parts/model")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    assert json.loads(Path("outputs/parts/result.json").read_text())["last"] == 4


def test_a_reward_model_judges_the_answers_of_base_and_result(rewarding, capfd):
    run()
    train(Path("preferred.yaml"), [], resume=False, overwrite=False)
    lines = Path("held_out.jsonl").read_text("utf-8").splitlines()
    rows = [{"question": json.loads(line)["prompt"]} for line in lines]
    task = LIKED | {"data": str(write_jsonl(Path("asked.jsonl"), rows))}
    eval_recipe(Path("preferred.yaml"), [f"eval.tasks={json.dumps([task])}"], [])
    base, tuned = json.loads(Path("outputs/preferred/eval.json").read_text())["models"]
    classifier = AutoModelForSequenceClassification.from_pretrained("outputs/reward/model")
    tokenizer = AutoTokenizer.from_pretrained("outputs/reward/model")

    def score(question, answer):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            return classifier(torch.tensor([ids])).logits.item()

    scores = {}
    for name, found in (("base", base), ("tuned", tuned)):
        measured = found["tasks"]["liked"]
        answered = zip(rows, measured["answers"], strict=True)
        scores[name] = [score(row["question"], answer) for row, answer in answered]
        assert measured["per_question"]["reward"] == pytest.approx(scores[name], abs=1e-4)
    wins = [
        0.5 if ours == theirs else float(ours > theirs)
        for ours, theirs in zip(scores["tuned"], scores["base"], strict=True)
    ]
    assert tuned["tasks"]["liked"]["figures"]["wins"] == sum(wins) / len(wins)
    assert base["tasks"]["liked"]["figures"]["wins"] == 0.5
    assert "wins" in capfd.readouterr().out
    before = Path("outputs/preferred/eval.json").read_text()
    eval_recipe(Path("preferred.yaml"), [f"eval.tasks={json.dumps([task])}"], [])
    assert "earlier run: liked" in capfd.readouterr().out.replace("\n", " ")
    assert json.loads(Path("outputs/preferred/eval.json").read_text()) == json.loads(before)


def test_an_answer_without_a_score_loses_and_counts_as_the_lowest(monkeypatch, tmp_path):
    scores = {"base": [None, 0.5, None, -4.0], "tuned": [-3.0, None, None, -2.0]}
    monkeypatch.setattr(tasks, "_scored_answers", lambda _task, _asked, it: ([], scores[it.name]))
    base = EvaluatedModel(None, None, name="base")
    tuned = EvaluatedModel(None, None, name="tuned", base=base)
    task = RewardTask(**LIKED | {"data": tmp_path, "reward_model": tmp_path})
    found = tasks.run_task(task, [], tuned)
    assert found.per_question["wins"] == [1.0, 0.0, 0.5, 1.0]
    assert found.per_question["reward"] == [-3.0, -3.0, -3.0, -2.0]
    assert found.refused == 2


def test_a_task_whose_reward_model_is_none_is_refused_before_any_model_loads(rewarding):
    task = LIKED | {"data": "held_out.jsonl", "reward_model": "outputs/base/model"}
    with pytest.raises(ModelError, match="holds no reward model, a classifier with one label"):
        eval_recipe(Path("preferred.yaml"), [f"eval.tasks={json.dumps([task])}"], [])
