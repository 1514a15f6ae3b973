"""Scores of written answers: exact match, labels, forms and rules."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from yrunner.errors import DataError, YRunnerError
from yrunner.evaluation.questions import read_questions
from yrunner.evaluation.scorers import (
    ALL_RULES,
    NO_LABEL,
    Answered,
    check_labels,
    confusion,
    find_label,
    form_check,
    headline_of,
    labels_of,
    macro_f1,
    mean_score,
    rule_figures,
)
from yrunner.recipe.schema.eval import AnswerTask, JsonForm, RegexForm, Rule


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Belo", True),
        (" Belo\n", True),
        ("belo.", True),
        ("Bela", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_says_what_the_reference_says(answer, right):
    assert Answered("Capital?", "Belo", answer).is_right is right


def test_the_share_of_right_answers():
    answered = [Answered("q", "a", "a"), Answered("q", "a", "b"), Answered("q", "a", "a")]
    assert mean_score(answered, "exact") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("references", "headline"),
    [
        (["Belo", "Dane is it.", "word " * 200], "exact"),
        (["word " * 10], "exact"),
        (["word " * 11], "rouge_l"),
        (["税率是百分之十三。", "是"], "exact"),
        (["根据港口法典第一条的规定吊销执照"] * 3, "rouge_l"),
    ],
)
def test_the_main_figure_of_answers_follows_from_the_length_of_the_references(references, headline):
    task = AnswerTask(kind="answer", name="t", side="domain", data=Path("rows.jsonl"))
    assert headline_of(task, references) == headline
    chosen = task.model_copy(update={"headline": "contains"})
    assert headline_of(chosen, references) == "contains"


def test_an_answer_that_says_more_than_the_reference_scores_in_every_figure_but_exact():
    answered = Answered("Capital?", "Belo", "It is Belo.")
    scores = [answered.score(figure) for figure in ("exact", "contains", "f1", "rouge_l")]
    assert scores == [0, 1, 0.5, 0.5]


LABELS = ["legal", "not legal", "合同"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Legal.", "legal"),
        ("This is not legal!", "not legal"),
        ("这是合同纠纷", "合同"),
        ("legal or 合同", NO_LABEL),
        ("illegal", NO_LABEL),
        ("", NO_LABEL),
    ],
)
def test_an_answer_names_a_label_alone(answer, label):
    assert find_label(answer, LABELS) == label


def test_the_confusion_matrix_counts_every_question_once():
    references = ["a", "a", "a", "b", "b"]
    taken = ["a", "b", NO_LABEL, "b", "a"]
    assert confusion(["a", "b"], references, taken) == [[1, 1, 1], [1, 1, 0]]


def test_macro_f1_by_hand():
    references = ["a", "a", "a", "b", "c"]
    taken = ["a", "a", "b", "b", NO_LABEL]
    # a: precision 1, recall 2/3. b: precision 1/2, recall 1. c: never given.
    assert macro_f1(references, taken) == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


@pytest.fixture
def asked(tmp_path: Path):
    rows = [{"question": f"{label}?", "answer": label} for label in ("b", "a", "b")]
    return read_questions(write_jsonl(tmp_path / "l.jsonl", rows))


def test_labels_come_from_the_data_where_the_task_names_none(asked):
    assert labels_of([], asked) == ["a", "b"]
    assert labels_of(["b", "a"], asked) == ["b", "a"]
    check_labels([], asked)


def test_labels_that_were_never_seen_are_refused(asked):
    with pytest.raises(DataError, match=r'l\.jsonl row 2: label "a" is not one of "b", "c"'):
        check_labels(["b", "c"], asked)
    with pytest.raises(DataError, match=r'l\.jsonl: no row has the label "c"'):
        check_labels(["a", "b", "c"], asked)
    with pytest.raises(DataError, match=r'every row has the label "a"; classification needs'):
        check_labels([], asked[1:2])


SCHEMA = {"type": "object", "required": ["years"], "properties": {"years": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ("Article 12.", True),
        (" Article 3. \n", True),
        ("It is Article 3.", False),
        ("", False),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(answer, valid):
    check = form_check(RegexForm(kind="regex", pattern=r"Article \d+\."))
    assert check(answer) is valid


def test_a_dot_matches_line_ends_too():
    assert form_check(RegexForm(kind="regex", pattern="a.*b"))("a\n\nb")


@pytest.mark.parametrize(
    ("answer", "is_json", "follows"),
    [
        ('{"years": 9}', True, True),
        ('{"years": "九"}', True, False),
        ("[1, 2]", True, False),
        ('{"years": 9} 😀', False, False),
        ("```json\n{}\n```", False, False),
        ("NaN", False, False),
        ("[" * 100_000, False, False),
        ("", False, False),
    ],
)
def test_json_is_json_and_follows_its_schema(tmp_path, answer, is_json, follows):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert form_check(JsonForm(kind="json"))(answer) is is_json
    assert form_check(JsonForm(kind="json", json_schema=path))(answer) is follows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"schema\.json:1:2: .+\. Correct the JSON"),
        ('{"type": "objekt"}', r"schema\.json: is not a JSON Schema: .+\. Correct the schema"),
        ('\ufeff{"type": "objekt"}', r"schema\.json: is not a JSON Schema: .+\. Correct the"),
    ],
)
def test_a_schema_that_is_none_is_refused(tmp_path, content, said):
    path = tmp_path / "schema.json"
    path.write_text(content, "utf-8")
    with pytest.raises(YRunnerError, match=said):
        form_check(JsonForm(kind="json", json_schema=path))


def test_rules_are_kept_one_by_one_and_all_together():
    rules = [
        Rule(name="cites", must_match=r"第\d+条"),
        Rule(name="promises nothing", must_not_match="保证|guarantee"),
    ]
    kept = rule_figures("根据第5条，保证退款。", rules)
    assert kept == {ALL_RULES: 0.0, "cites": 1.0, "promises nothing": 0.0}
    assert rule_figures("根据第5条。", rules)[ALL_RULES] == 1
    assert next(iter(kept)) == ALL_RULES
