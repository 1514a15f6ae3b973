"""Every kind of task on a model, against the slow and obvious way."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import questions, write_jsonl
from tests.evaluation.test_generate import always
from yrunner.errors import DataError
from yrunner.evaluation.evaluated_model import EvaluatedModel
from yrunner.evaluation.generate import Generated
from yrunner.evaluation.tasks import read_task, run_task
from yrunner.recipe.schema.eval import (
    AnswerTask,
    ChoiceTask,
    ClassifyTask,
    FormatTask,
    JsonForm,
    PerplexityTask,
    PreferenceTask,
    QualityTask,
    RegexForm,
    Rule,
    RuleTask,
)

ROWS = [{"question": question, "answer": answer} for question, answer in questions(6)]


@pytest.fixture
def evaluated(make_talker, capitals_tokenizer):
    return EvaluatedModel(make_talker(seed=3), capitals_tokenizer, batch_size=4)


@pytest.fixture
def saying_a(make_model, capitals_tokenizer):
    """A model that writes nothing but the letter a."""
    (letter,) = capitals_tokenizer("a", add_special_tokens=False)["input_ids"]
    return EvaluatedModel(always(make_model(), letter), capitals_tokenizer)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def run(task, evaluated):
    return run_task(task, read_task(task), evaluated)


def reply_loss(evaluated, question, reply):
    """Nats of each token of a reply and its end mark, from the full logits of the whole text."""
    tokenizer, model = evaluated.tokenizer, evaluated.model
    turns = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    more = tokenizer(reply, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        log_TV = model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
    return [-float(log_TV[len(ids) + place - 1, token]) for place, token in enumerate(more)]


def test_answers_are_compared_with_their_references(saying_a, file, tmp_path):
    task = AnswerTask(kind="answer", name="t", side="domain", data=file, max_new_tokens=3)
    result = run(task, saying_a)
    assert result.answers == ["aaa"] * 6
    assert (result.figures["exact"], result.headline, result.side) == (0, "exact", "domain")
    right = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": "AAA."}, ROWS[0]])
    result = run(task.model_copy(update={"data": right}), saying_a)
    assert result.per_question["exact"] == [1, 0]
    assert result.figures["exact"] == 0.5
    assert len(saying_a.written) == 8, "everything that was written is kept together"


def test_a_question_too_long_for_the_model_is_refused_and_wrong(saying_a, tmp_path):
    rows = [{"question": "long " * 600}, {"question": "short"}]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    rules = [Rule(name="no b", must_not_match="b")]
    task = RuleTask(
        kind="judge_by_rule", name="t", side="domain", data=file, rules=rules, max_new_tokens=2
    )
    result = run(task, saying_a)
    assert result.refused == 1
    assert result.per_question["no b"] == [0, 1]
    assert len(saying_a.written) == 1


def test_forms_and_quality_need_no_reference(saying_a, tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Say a."}])
    shared = {"name": "t", "side": "domain", "data": file}
    pattern = RegexForm(kind="regex", pattern="a+")
    task = FormatTask(kind="format", form=pattern, max_new_tokens=9, **shared)
    assert run(task, saying_a).figures == {"valid": 1.0}
    task = FormatTask(kind="format", form=JsonForm(kind="json"), max_new_tokens=9, **shared)
    assert run(task, saying_a).figures == {"valid": 0.0}
    task = QualityTask(kind="quality", name="t", data=file, max_new_tokens=9)
    figures = run(task, saying_a).figures
    assert figures["never_stopped"] == 1
    assert figures["unrepeated"] == 1 - figures["repetition_4"]


@pytest.mark.parametrize("by", ["writing", "likelihood"])
def test_labels_are_written_or_the_likeliest(evaluated, tmp_path, by):
    labels = ["Belo", "Dane", "Fane is it"]
    rows = [{"question": f"Which {number}?", "answer": labels[number % 3]} for number in range(5)]
    file = write_jsonl(tmp_path / "l.jsonl", rows)
    task = ClassifyTask(
        kind="classify", name="t", side="domain", data=file, by=by, max_new_tokens=4
    )
    result = run(task, evaluated)
    if by == "likelihood":
        expected = [
            min(labels, key=lambda label: sum(reply_loss(evaluated, row["question"], label)))
            for row in rows
        ]
        assert result.answers == expected
        assert not evaluated.written
    hits = [float(taken == row["answer"]) for taken, row in zip(result.answers, rows, strict=True)]
    assert result.per_question == {"accuracy": hits}
    assert set(result.figures) == {"accuracy", "macro_f1"}


def test_the_choice_is_the_likeliest_per_character(evaluated, tmp_path):
    choices = ["Belo", "Belo is the capital. " * 3, "Jorn or Hulm", "7"]
    rows = [
        {"question": f"Capital {number}?", "choices": choices, "answer": number % 4}
        for number in range(4)
    ]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    result = run(ChoiceTask(kind="choice", name="t", side="general", data=file), evaluated)
    choices = [choice.strip() for choice in choices]
    for number, row in enumerate(rows):
        costs = {choice: sum(reply_loss(evaluated, row["question"], choice)) for choice in choices}
        by_length = min(choices, key=lambda choice: costs[choice] / len(choice))
        right = choices[row["answer"]]
        assert result.answers[number] == by_length
        assert result.per_question["accuracy"][number] == (by_length == right)
        assert result.per_question["unnormalised"][number] == (min(costs, key=costs.get) == right)


SIDES = ("chosen", "rejected")


def test_the_better_answer_should_be_likelier_and_more_so_than_for_the_base(
    evaluated, make_talker, capitals_tokenizer, tmp_path
):
    rows = [
        {"prompt": question, "chosen": answer, "rejected": f"{answer[:9]} perhaps {len(answer)}"}
        for question, answer in questions(5)
    ]
    rows[2] |= {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    task = PreferenceTask(kind="preference", name="t", side="domain", data=data)
    base = EvaluatedModel(make_talker(seed=9), capitals_tokenizer, batch_size=3)

    def margin(model, row):
        costs = (
            sum(reply_loss(model, row["prompt"], row[side])) for side in ("rejected", "chosen")
        )
        return next(costs) - next(costs)

    alone = run(task, evaluated)
    margins = [margin(evaluated, row) for row in rows]
    assert alone.per_question["margin"] == pytest.approx(margins, rel=1e-4)
    assert alone.per_question["accuracy"] == [float(each > 0) for each in margins]
    assert "reward_accuracy" not in alone.figures
    beside = run(task, replace(evaluated, base=base))
    rewards = [now - margin(base, row) for now, row in zip(margins, rows, strict=True)]
    assert beside.per_question["reward_margin"] == pytest.approx(rewards, rel=1e-3)
    assert beside.per_question["reward_accuracy"] == [float(each > 0) for each in rewards]
    itself = run(task, replace(evaluated, base=evaluated))
    assert itself.figures["reward_accuracy"] == 0.5 and itself.figures["reward_margin"] == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "p.jsonl row 3"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "p.jsonl row 3"),
        ({"prompt": "a", "chosen": "b"}, "p.jsonl row 3"),
    ],
)
def test_a_faulty_pair_of_a_task_is_refused_with_its_row(tmp_path, row, reason):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = write_jsonl(tmp_path / "p.jsonl", [good, good | {"prompt": "d"}, row])
    task = PreferenceTask(kind="preference", name="t", side="domain", data=data)
    with pytest.raises(DataError, match=reason):
        read_task(task)


def test_perplexity_of_answers_is_that_of_their_tokens(evaluated, file):
    result = run(PerplexityTask(kind="perplexity", name="t", side="general", data=file), evaluated)
    rows = [reply_loss(evaluated, row["question"], row["answer"]) for row in ROWS]
    tokens = [loss for row in rows for loss in row]
    mean = sum(tokens) / len(tokens)
    assert result.figures["loss"] == pytest.approx(mean, rel=1e-4)
    assert result.figures["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    expected = [math.exp(-sum(row) / len(row)) for row in rows]
    assert result.per_question["probability"] == pytest.approx(expected, rel=1e-4)


def test_a_long_text_is_read_in_windows(evaluated, tmp_path):
    text = "Belo is the capital of Aru. " * 8
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": text}])
    task = PerplexityTask(kind="perplexity", name="t", side="general", data=file, window=16)
    result = run(task, evaluated)
    tokenizer = evaluated.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    losses = []
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 16]
        with torch.no_grad():
            log_TV = evaluated.model(torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-float(log_TV[place, token]) for place, token in enumerate(window[1:])]
    assert result.figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_reply_too_long_for_the_model_is_refused(evaluated, tmp_path):
    rows = [{"question": "q?", "answer": "long " * 600}, ROWS[0]]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    task = PerplexityTask(kind="perplexity", name="t", side="general", data=file)
    result = run(task, evaluated)
    assert result.refused == 1
    assert result.per_question["probability"][0] == 0 < result.per_question["probability"][1]


@pytest.mark.parametrize("kind", ["perplexity", "classify"])
def test_reading_is_the_same_for_any_batch_size(make_model, capitals_tokenizer, file, kind):
    shared = {"name": "t", "side": "general", "data": file}
    task = (
        PerplexityTask(kind="perplexity", **shared)
        if kind == "perplexity"
        else ClassifyTask(kind="classify", by="likelihood", **shared)
    )
    model = make_model(seed=3)
    one, other = (
        run(task, EvaluatedModel(model, capitals_tokenizer, batch_size=size)) for size in (1, 16)
    )
    assert one.answers == other.answers
    assert one.figures == pytest.approx(other.figures, rel=1e-5)


def test_faulty_data_is_found_when_it_is_read(tmp_path):
    shared = {"name": "t", "side": "domain"}
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "q", "answer": "a"}])
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": 3}))
    form = JsonForm(kind="json", json_schema=schema)
    for task, reason in (
        (FormatTask(kind="format", data=file, form=form, **shared), "is not a JSON Schema"),
        (ClassifyTask(kind="classify", data=file, **shared), "needs two or more"),
        (ChoiceTask(kind="choice", data=file, **shared), "not a list of two choices"),
    ):
        with pytest.raises(DataError, match=reason):
            read_task(task)


THINKS = "<think>\n2 + 2? 5?\n</think>\n\n"


def saying(texts, capitals_tokenizer, monkeypatch, **options):
    """A model that writes these texts, one after another."""
    written = [Generated(text, 9, stopped=True) for text in texts]
    monkeypatch.setattr(EvaluatedModel, "_answers", lambda self, questions, _: written)
    return EvaluatedModel(None, capitals_tokenizer, **options)


def test_a_model_that_thinks_is_not_called_wrong_for_it(tmp_path, capitals_tokenizer, monkeypatch):
    rows = [{"question": "2+2?", "answer": answer} for answer in ("4", f"{THINKS}4", "4", "4")]
    file = write_jsonl(tmp_path / "sums.jsonl", rows)
    task = AnswerTask(kind="answer", name="t", side="domain", data=file)
    texts = [f"{THINKS}4", "4", "<think>\n4, I think", f"{THINKS}5"]
    result = run(task, saying(texts, capitals_tokenizer, monkeypatch))
    assert result.per_question["exact"] == [1, 1, 0, 0]
    assert result.per_question["contains"] == [1, 1, 0, 0], "thinking that never ends is no answer"
    assert (result.unfinished, result.answers) == (1, ["4", "4", "", "5"])
    rules = [Rule(name="no 5", must_not_match="5")]
    task = RuleTask(kind="judge_by_rule", name="t", side="domain", data=file, rules=rules)
    assert run(task, saying(texts, capitals_tokenizer, monkeypatch)).figures["no 5"] == 0.75
    pattern = RegexForm(kind="regex", pattern="[0-9]")
    task = FormatTask(kind="format", name="t", side="domain", data=file, form=pattern)
    assert run(task, saying(texts, capitals_tokenizer, monkeypatch)).figures["valid"] == 0.75
    task = ClassifyTask(
        kind="classify", name="t", side="domain", labels=["4", "5"],
        data=write_jsonl(tmp_path / "l.jsonl", [*rows[:3], {"question": "?", "answer": "5"}]),
    )  # fmt: skip
    result = run(task, saying(texts, capitals_tokenizer, monkeypatch))
    assert (result.per_question["accuracy"], result.unfinished) == ([1, 1, 0, 1], 1)


def test_thinking_can_be_counted_as_a_part_of_the_answer(tmp_path, capitals_tokenizer, monkeypatch):
    rows = [{"question": "2+2?", "answer": answer} for answer in ("4", f"{THINKS}4")]
    file = write_jsonl(tmp_path / "sums.jsonl", rows)
    task = AnswerTask(kind="answer", name="t", side="domain", data=file)
    model = saying([f"{THINKS}4"] * 2, capitals_tokenizer, monkeypatch, thinking_apart=False)
    result = run_task(task, read_task(task, thinking_apart=False), model)
    assert (result.per_question["exact"], result.unfinished) == ([0, 1], 0)


def test_a_prompt_that_opens_the_thinking_asks_for_its_end(
    tmp_path, capitals_tokenizer, monkeypatch
):
    opening = copy.deepcopy(capitals_tokenizer)
    opening.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    file = write_jsonl(tmp_path / "sums.jsonl", [{"question": "2+2?", "answer": "4"}] * 2)
    task = AnswerTask(kind="answer", name="t", side="domain", data=file)
    result = run(task, saying(["4", "so 4\n</think>\n\n4"], opening, monkeypatch))
    assert (result.per_question["exact"], result.unfinished) == ([0, 1], 1)
