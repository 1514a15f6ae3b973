"""What is one unit of a text, and what makes no difference between two texts."""

import pytest

from yrunner.evaluation.text_metrics import pieces_of, units_of


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("The answer, e.g. 42!", ["the", "answer", "e", "g", "42"]),
        ("根据《港口法典》第12条", ["根", "据", "港", "口", "法", "典", "第", "12", "条"]),
        ("ＡＢＣ　１２３", ["abc", "123"]),
        ("1,000.50 - 3", ["1000.50", "3"]),
        ("-5 and −7 but 3-4", ["-5", "and", "-7", "but", "3", "4"]),
        ("12% of $5 + x", ["12", "%", "of", "$", "5", "+", "x"]),
        ("snake_case Straße", ["snake", "case", "strasse"]),
        ("テスト", ["テ", "ス", "ト"]),
        ("？！", []),
    ],
)
def test_units_are_words_numbers_and_chinese_characters(text, units):
    assert units_of(text) == units


def test_pieces_keep_signs_and_case():
    assert pieces_of("Go, go！") == ["Go", ",", "go", "！"]
