"""What an answer says: each reward by value."""

import time

import pytest

from tests.rewards.conftest import answer
from yrunner.rewards.completion import total_rewards
from yrunner.rewards.text import read_answer


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        ("42", "42", 1),
        ("42", 42, 1),
        ("42", 42.0, 1),
        ("42.", "42", 1),
        (" Forty-Two ", "forty two", 1),
        ("４２。", "42", 1),
        ("ＡＢ", "ab", 1),
        ("1,000", "1000", 1),
        ("-5", "5", 0),
        ("\N{MINUS SIGN}5", "-5", 1),
        ("5%", "5", 0),
        ("the answer is 42", "42", 0),
        ("北京", "北 京", 1),
        ("yes", ["no", "Yes!"], 1),
        ("true", True, 1),
        ("", "42", 0),
        ("...", "...", 1),
        ("..", "...", 0),
        ("<think>41</think>42", "42", 1),
        ("42", "<think>six by seven</think>42", 1),
        ("<think>the answer must be 42", "42", 0),
    ],
)
def test_exact_compares_texts_without_the_differences_that_mean_nothing(
    score, text, right, expected
):
    assert score(text, kind="exact", columns={"answer": right}) == expected


@pytest.mark.parametrize(
    ("ignore", "texts"),
    [
        ([], ["Ab, c"]),
        (["case"], ["Ab, c", "aB, C"]),
        (["width"], ["Ab, c", "Ａb, c"]),
        (["blanks"], ["Ab, c", "Ab ,  c"]),
        (["punctuation"], ["Ab, c", "Ab c", "Ab. c"]),
        (["punctuation", "blanks"], ["Ab, c", "Ab c", "Ab.c", "Ab ,  c", "Ab. c"]),
    ],
)
def test_exact_ignores_only_what_it_is_told_to(score, ignore, texts):
    given = ["Ab, c", "aB, C", "Ａb, c", "Ab ,  c", "Ab c", "Ab. c", "Ab.c"]
    found = score(*given, kind="exact", ignore=ignore, columns={"answer": "Ab, c"})
    assert [text for text, one in zip(given, found, strict=True) if one] == [
        text for text in given if text in texts
    ]


def test_a_tag_narrows_an_answer_to_what_its_last_pair_of_marks_encloses():
    text = "<answer>1</answer> no, <answer>\n2\n</answer> ok"
    assert read_answer(text, "answer") == "2"
    assert read_answer("<answer>2", "answer") is None
    assert read_answer("2</answer>", "answer") is None
    assert read_answer("</answer>2<answer>", "answer") is None
    assert read_answer("<think>9</think> <b>1</b>", "b") == "1"
    assert read_answer("<think>9</think> 1 ", None) == "1"


@pytest.mark.parametrize("kind", ["exact", "number"])
def test_an_answer_without_its_tag_scores_0(score, kind):
    texts = ("42", "<answer>42</answer>", "<answer>41</answer>42")
    assert score(*texts, kind=kind, tag="answer", columns={"answer": "42"}) == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        ("It is 42.", "42", 1),
        ("6 times 7 is 42, so 42", 42, 1),
        ("42 apples and 3 pears", "42", 0),
        ("1,234", "1234", 1),
        ("1，234", "1234", 1),
        ("１２３４．５", 1234.5, 1),
        ("1,2", "2", 1),
        ("12,345,678", 12345678, 1),
        ("1234,567", "567", 1),
        ("-3", "-3", 1),
        ("\N{MINUS SIGN}3", -3, 1),
        ("8-3", "3", 1),
        ("8 - 3 = 5", "5", 1),
        ("= -5", "5", 0),
        ("$1,200.50", "1200.5", 1),
        ("0.10", 0.1, 1),
        (".5", "0.5", 1),
        ("3.", "3", 1),
        ("1e3", "1000", 1),
        ("2.5E-2", "0.025", 1),
        ("3/4", "0.75", 1),
        ("1/3", "1/3", 1),
        ("5/0", "5", 1),
        ("1.5万", "15000", 1),
        ("答案是三十", "30", 0),
        ("共12 亿", 1_200_000_000, 1),
        ("no number", "3", 0),
        ("", "3", 0),
        ("She has 72.", "48 + 24 = 72\n#### 72", 1),
        ("\\boxed{7}", "7", 1),
        ("x2", "2", 1),
        ("2024-05-01", "1", 1),
        ("٤٢", "42", 1),
    ],
)
def test_number_compares_the_last_numbers(score, text, right, expected):
    assert score(text, kind="number", columns={"answer": right}) == expected


def test_tolerances_include_their_ends_and_are_of_the_right_number(score):
    texts = ("9.9", "9.89", "10.1", "10.11")
    at_ten = {"answer": "10"}
    assert score(*texts, kind="number", tolerance=0.1, columns=at_ten) == [1, 0, 1, 0]
    assert score(*texts, kind="number", relative_tolerance=0.01, columns=at_ten) == [1, 0, 1, 0]
    assert score("0.001", kind="number", relative_tolerance=0.5, columns={"answer": 0}) == 0


def test_a_pattern_may_match_anywhere_or_the_whole(score):
    texts = ("a\nb", "xa\nb", "ab")
    assert score(*texts, kind="pattern", pattern="a.b") == [1, 1, 0]
    assert score(*texts, kind="pattern", pattern="a.b", match="whole") == [1, 0, 0]
    assert score("<t>ab</t>", "ab", kind="pattern", pattern="ab", match="whole", tag="t") == [1, 0]


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(\w+\s?)*!", r"^(([a-z])+.)+[A-Z]$"])
def test_a_pattern_that_backtracks_for_ever_counts_as_no_match(score, capsys, pattern):
    start = time.monotonic()
    assert score("a" * 60, "a" * 60, kind="pattern", pattern=pattern) == [0, 0]
    assert time.monotonic() - start < 30
    printed = capsys.readouterr().err
    assert printed.count("took more than 1 s") <= 1


def test_length_falls_over_its_margin(score):
    lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    given = [answer("word", num_tokens=length) for length in lengths]
    kind = {"kind": "length", "minimum": 3, "maximum": 5}
    assert score(*given, **kind) == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert score(*given, **kind, margin=2) == [0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]
    assert score(*given, kind="length", maximum=5, margin=2) == [1] * 6 + [0.5, 0, 0]


def test_length_counts_words_or_characters(score):
    text = "Two words, 12,345 和 四个汉字."
    assert score(text, kind="length", unit="words", minimum=8, maximum=8) == 1
    assert score(text, kind="length", unit="characters", minimum=len(text), maximum=len(text)) == 1
    tagged = "<a>one two</a> three"
    assert score(tagged, kind="length", unit="words", tag="a", minimum=2, maximum=2) == 1


def test_repetition_is_the_share_of_ngrams_that_occur_once(score):
    # abcd occurs twice among the 5 n-grams of "a b c d a b c d".
    assert score("a b c d a b c d", kind="repetition") == pytest.approx(1 - 2 / 5)
    assert score("a b c d", kind="repetition") == 1
    assert score("a a a a", kind="repetition", size=1) == 0
    assert score("", kind="repetition") is None
    assert score("no tag", kind="repetition", tag="a") == 0
    assert 0 < score("a b c d a b c d", kind="repetition", measure="windowed") < 1


def test_language_is_the_share_of_letters(score):
    assert score("ab中文", "中文！", "abc 123", "кот", kind="language", language="zh") == [
        0.5,
        1,
        0,
        0,
    ]
    assert score("ab中文", "中文！", "abc 123", kind="language", language="en") == [0.5, 0, 1]
    assert score("42 + 1", kind="language", language="en") is None


def test_a_reward_without_an_opinion_leaves_the_sum():
    parts = [[1.0, None, None, 0.5], [2.0, 4.0, None, None], [9.0, 9.0, 9.0, 9.0]]
    assert total_rewards(parts, [1.0, 0.5, 0.0]) == [2.0, 2.0, None, 0.5]
    assert total_rewards([[1.0]], [-2.0]) == [-2.0]
    assert total_rewards([[None]], [1.0]) == [None]
