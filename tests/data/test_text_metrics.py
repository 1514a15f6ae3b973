"""Units, answers and repetition, counted by hand and by the libraries that others use."""

from collections import Counter

import pytest

from yrunner.data.text_metrics import (
    ANSWER_FIGURES,
    answer_figures,
    at_equal_length,
    bleu,
    chrf,
    contains,
    density,
    distinct,
    f1,
    is_exact,
    pieces_of,
    repetition,
    rouge_l,
    text_quality,
    units_of,
    windowed_repetition,
)


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


PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("根据第12条，处罚款5枚银币。", "根据第2条的规定，处罚款5枚银币。"),
    ("The fine 是 5 coins", "the fine is 5 银币"),
    ("", "Belo"),
    ("nothing alike", "gar kein Wort"),
]


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("Belo", "belo.", True),
        ("５枚 银币", "5枚银币。", True),
        ("1,000 coins", "1000 coins", True),
        ("-5", "5", False),
        ("1.5", "15", False),
        ("5%", "5", False),
        ("Belo is it", "Belo", False),
        ("", "Belo", False),
        ("!", "!", True),
        ("?", "!", False),
    ],
)
def test_an_answer_is_exact_whatever_its_width_case_punctuation_and_blanks(
    answer, reference, exact
):
    assert is_exact(answer, reference) is exact


@pytest.mark.parametrize(
    ("answer", "reference", "found"),
    [
        ("I think it is Belo, really", "Belo", True),
        ("罚款 5 枚银币", "5枚银币", True),
        ("罚款 15 枚银币", "5枚银币", False),
        ("Below", "Belo", False),
        ("a b", "a b c", False),
        ("so: !", "!", True),
    ],
)
def test_a_reference_is_contained_as_whole_words(answer, reference, found):
    assert contains(answer, reference) is found


def test_f1_by_hand():
    # In common: the twice, cat, on, mat = 5 of 6 and 6.
    assert f1(*map(units_of, PAIRS[0])) == pytest.approx(5 / 6)
    # In common: 12 characters and numbers but for "12", of 12 and 15.
    assert f1(*map(units_of, PAIRS[1])) == pytest.approx(2 * 11 / 27)
    assert f1([], ["a"]) == 0
    assert f1(["b", "a"], ["a", "b"]) == 1


def test_rouge_l_by_hand_minds_the_order():
    assert rouge_l(["b", "a"], ["a", "b"]) == pytest.approx(1 / 2)
    assert rouge_l(list("axbyc"), list("abc")) == pytest.approx(2 * 3 / 8)
    assert rouge_l([], ["a"]) == 0


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_l_is_that_of_rouge_score_on_the_same_units(answer, reference):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Units:
        def tokenize(self, text):
            return units_of(text)

    expected = scorer.RougeScorer(["rougeL"], tokenizer=Units()).score(reference, answer)
    assert rouge_l(units_of(answer), units_of(reference)) == pytest.approx(
        expected["rougeL"].fmeasure
    )


def test_bleu_by_hand():
    # 1-grams 3 of 4, 2-grams 2 of 3, 3-grams 1 of 2, 4-grams 0 of 1, smoothed to 1/2; same length.
    by_hand = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)
    assert bleu("a b c x", "a b c d") == pytest.approx(by_hand)
    assert bleu("罚款五枚", "罚款五年") == pytest.approx(by_hand), "each character is a word"
    assert bleu("a b", "a b") == pytest.approx(1), "of a short answer only its own n-grams"
    assert bleu("", "a") == 0


def test_chrf_by_hand():
    # Precision and recall of 1-grams are 2/3, of 2-grams 1/2, of 3-grams 0; there are no others.
    assert chrf("abx", "aby") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert chrf("银币", "银币") == pytest.approx(1)


def test_all_figures_of_the_same_answer_are_one():
    figures = answer_figures("Belo", "Belo")
    assert set(figures) == set(ANSWER_FIGURES)
    assert all(value == pytest.approx(1) for value in figures.values())


def repetition_of_the_seed(tokens, n=4):
    """As the article defines it from which the measure comes."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(ngrams)
    total = len(ngrams)
    repeated = sum(c for c in counts.values() if c > 1)
    return repeated / total if total > 0 else 0


def test_repetition_is_the_share_of_ngrams_that_occur_more_than_once():
    # abc bca cab abc: abc twice of four.
    assert repetition(list("abcabc"), 3) == pytest.approx(2 / 4)
    assert repetition(list("abcdef"), 3) == 0
    assert repetition(list("ab"), 3) == 0


@pytest.mark.parametrize("text", ["", "abc", "abcabcab", "aaaaaaa", "更独立，更独立，更独立"])
@pytest.mark.parametrize("size", [3, 4])
def test_repetition_reproduces_its_source(text, size):
    assert repetition(list(text), size) == pytest.approx(repetition_of_the_seed(list(text), size))


def test_a_near_repeat_weighs_more_than_a_far_one_and_one_beyond_the_window_nothing():
    stuck = windowed_repetition(["a"] * 13, size=4, window=50)
    assert stuck == pytest.approx(9 / 10), "all of the ten n-grams but the first"
    far = ["a", "b", "c", "d", *map(str, range(20)), "a", "b", "c", "d"]
    # One of 25 n-grams comes back, at a distance of 24.
    assert windowed_repetition(far, size=4, window=50) == pytest.approx((1 - 23 / 50) / 25)
    assert windowed_repetition(far, size=4, window=23) == 0
    assert windowed_repetition([], size=4) == 0


def test_distinct_is_the_share_of_different_ngrams():
    assert distinct(list("aab"), 1) == pytest.approx(2 / 3)
    assert distinct(list("abab"), 2) == pytest.approx(2 / 3)
    assert distinct([], 2) == 1


def test_density_falls_where_nothing_new_is_said():
    assert density("更独立，" * 100) < 0.05
    assert density("So say what is new, with other words each time.") > 0.9
    assert density("") == 1


def test_length_counts_words_and_characters():
    assert text_quality("I say 你好。")["length"] == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The court may fine him.", "The court may fi"),
        ("根据第12条,罚款3.5元。以上", "根据第1"),
        ("a b c", "a b c"),
        ("a b c", ""),
        ("  ", "x"),
        ("no-end -3,000.5 of, it", "no-end -3,000.5"),
    ],
)
def test_texts_are_cut_to_the_same_pieces_but_the_last(one, other):
    first, second = at_equal_length(one, other)
    number = max(0, min(len(pieces_of(one)), len(pieces_of(other))) - 1)
    assert pieces_of(first) == pieces_of(one)[:number]
    assert pieces_of(second) == pieces_of(other)[:number]
    assert one.startswith(first) and other.startswith(second)
    assert at_equal_length(other, one) == (second, first)
