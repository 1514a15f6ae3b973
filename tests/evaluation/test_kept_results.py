"""What a base answered is found again by content, and nothing half-written or stale is."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import questions, write_jsonl
from tests.rounding import rounding
from yrunner.data.text_metrics import pieces_of
from yrunner.evaluation import evaluated_model
from yrunner.evaluation.evaluated_model import Deferred, EvaluatedModel
from yrunner.evaluation.kept_results import KeptResults
from yrunner.evaluation.tasks import read_task, run_task
from yrunner.recipe.schema.eval import AnswerTask, ClassifyTask, QualityTask, SampleWriting


def refuse():
    raise AssertionError("a model was loaded")


@pytest.fixture
def kept(tmp_path):
    return KeptResults(tmp_path / "kept", {"key": "a"})


@pytest.fixture
def file(tmp_path):
    rows = [{"question": question, "answer": answer} for question, answer in questions(5)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def task(file):
    return AnswerTask(kind="answer", name="t", side="general", data=file, max_new_tokens=7)


@pytest.fixture
def base(make_talker, capitals_tokenizer, kept):
    model = make_talker(seed=3)
    return EvaluatedModel(model, capitals_tokenizer, batch_size=2, kept=kept, name="t")


def test_a_result_is_measured_once_for_everything_that_it_depends_on(kept):
    measured = []

    def measure():
        measured.append(1)
        return [len(measured)]

    assert kept.recall("one", {"a": 1}, measure) == kept.recall("one", {"a": 1}, measure) == [1]
    assert not kept.reused, "this is not from an earlier command"
    later = KeptResults(kept.folder, kept.model)
    assert later.recall("one", {"a": 1}, measure) == [1]
    assert later.reused == ["one"]
    assert kept.recall("one", {"a": 2}, measure) == [2]
    assert replace(kept, model={"key": "b"}).recall("one", {"a": 1}, measure) == [3]


def test_what_was_interrupted_leaves_nothing_behind(kept):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.recall("one", {}, interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.recall_file({}, int, save=lambda *_: interrupt(), load=lambda _: 0)
    assert not [*kept.folder.glob("*"), *kept.folder.glob(".*")]
    assert kept.recall("one", {}, lambda: 5) == 5


@pytest.mark.parametrize("content", ["", "[1", "\x00"])
def test_a_damaged_file_is_measured_again(kept, content):
    kept.recall("one", {}, lambda: 5)
    (path,) = kept.folder.iterdir()
    path.write_text(content)
    assert kept.recall("one", {}, lambda: 6) == 6
    assert json.loads(path.read_text()) == 6


def test_kept_results_need_no_model_and_are_the_same(base, task):
    first = run_task(task, read_task(task), base)
    again = replace(base, model=Deferred(refuse), written=[])
    assert run_task(task, read_task(task), again) == first
    assert again.written == base.written, "the text quality of all answers is the same too"


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Be brief."},
        {"generation": SampleWriting(kind="sample")},
        {"kept": None},
    ],
)
def test_other_settings_are_asked_anew(base, task, change):
    run_task(task, read_task(task), base)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_task(task, read_task(task), replace(base, model=Deferred(refuse), **change))


def test_the_seed_counts_only_where_answers_are_drawn(base, task):
    run_task(task, read_task(task), base)
    run_task(task, read_task(task), replace(base, model=Deferred(refuse), seed=9))
    drawn = replace(base, generation=SampleWriting(kind="sample"))
    run_task(task, read_task(task), drawn)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_task(task, read_task(task), replace(drawn, model=Deferred(refuse), seed=9))


def slow_kl(base, tuned, tokenizer, question, max_new_tokens):
    """KL(base || tuned) at each token that the base writes greedily, one at a time."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            log_base_V, log_tuned_V = (
                model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                for model in (base, tuned)
            )
        found.append(float((log_base_V.exp() * (log_base_V - log_tuned_V)).sum()))
        ids.append(int(log_base_V.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["answer", "classify", "quality"])
def test_the_distance_from_the_base_is_its_divergence_over_the_bases_own_answers(
    base, make_talker, capitals_tokenizer, task, file, monkeypatch, kind
):
    # All tokens of this vocabulary: then nothing is left out.
    monkeypatch.setattr(evaluated_model, "NUM_LIKELIEST", 320)
    shared = {"name": "t", "side": "general", "data": file, "max_new_tokens": 7}
    task = {"answer": AnswerTask, "classify": ClassifyTask, "quality": QualityTask}[kind](
        kind=kind, **shared
    )
    asked = read_task(task)
    assert run_task(task, asked, base).per_question["kl"] == [0.0] * 5
    tuned = make_talker(seed=4)
    other = EvaluatedModel(tuned, capitals_tokenizer, base=replace(base, model=Deferred(refuse)))
    result = run_task(task, asked, other)
    expected = [
        slow_kl(base.model, tuned, capitals_tokenizer, question, 7) for question, _ in questions(5)
    ]
    assert min(expected) > 0.1
    assert result.per_question["kl"] == pytest.approx(expected, rel=1e-4)
    assert result.figures["kl"] == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_a_distance_without_the_unlikely_tokens_is_never_too_large(
    base, make_talker, capitals_tokenizer, task, monkeypatch
):
    found = {}
    for number in (4, 64, 320):
        monkeypatch.setattr(evaluated_model, "NUM_LIKELIEST", number)
        other = EvaluatedModel(make_talker(seed=4), capitals_tokenizer, base=base)
        found[number] = run_task(task, read_task(task), other).figures["kl"]
    assert 0 < found[4] <= found[64] <= found[320] + rounding(8)


def test_the_same_weights_are_at_no_distance(base, make_talker, capitals_tokenizer, task):
    other = EvaluatedModel(make_talker(seed=3), capitals_tokenizer, base=base)
    kl = run_task(task, read_task(task), other).figures["kl"]
    assert kl == pytest.approx(0, abs=rounding(8, terms=320))


def test_a_model_with_another_vocabulary_has_no_distance(base, make_model, task):
    from yrunner.models.scratch import train_tokenizer

    tokenizer = train_tokenizer(["other words", "and nothing else"] * 9, vocab_size=270)
    other = EvaluatedModel(make_model(), tokenizer, base=base)
    figures = run_task(task, read_task(task), other).figures
    assert "kl" not in figures and "length" in figures


def test_a_question_that_the_base_was_not_asked_is_left_out(base, make_talker, tmp_path):
    rows = [{"question": "long " * 600, "answer": "a"}, {"question": "short?", "answer": "a"}]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    task = AnswerTask(kind="answer", name="t", side="general", data=file, max_new_tokens=3)
    result = run_task(task, read_task(task), base)
    assert (result.refused, result.per_question["kl"]) == (1, [0.0])


def test_length_and_distance_are_those_of_the_general_side_alone(base, task):
    domain = task.model_copy(update={"side": "domain"})
    assert not {"kl", "length"} & run_task(domain, read_task(domain), base).figures.keys()
    result = run_task(task, read_task(task), base)
    assert result.per_question["length"] == [len(pieces_of(answer)) for answer in result.answers]
