"""Questions are alike by the rare tokens they share."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring.questions import QUESTION_SIZE, question_vectors
from yrunner.tokens import IGNORE_INDEX


def make_example(question, answer=(90, 91)):
    ids = [0, *question, *answer]
    labels = [IGNORE_INDEX] * (1 + len(question)) + [*answer]
    return TokenizedExample(ids, labels, Origin(Path("rows.jsonl"), 1))


def slow_cosine(one, other, questions):
    """The cosine of two questions as sets of tokens, each with the logarithm of its rarity."""
    counts = Counter(token for question in questions for token in set(question))
    rarity = {token: math.log(len(questions) / count) for token, count in counts.items()}
    product = sum(rarity[token] ** 2 for token in set(one) & set(other))
    sizes = [math.sqrt(sum(rarity[token] ** 2 for token in set(part))) for part in (one, other)]
    return product / math.prod(sizes)


def test_products_of_vectors_are_the_cosines_of_the_slow_way():
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(2, 12, (40,), generator=generator).tolist()
    questions = [torch.randint(30, (size,), generator=generator).tolist() for size in sizes]
    vectors = question_vectors([make_example(question) for question in questions]).float()
    expected = [[slow_cosine(one, other, questions) for other in questions] for one in questions]
    difference = (vectors @ vectors.T - torch.tensor(expected)).abs()
    assert difference.diagonal().max() < 1e-2
    # A random projection errs by one over the root of its size.
    assert difference.mean() < 1 / math.sqrt(QUESTION_SIZE)


def test_a_shared_name_makes_questions_more_alike_than_shared_phrases():
    phrases, names = [[1, 2, 3], [4, 5, 6]], range(20, 40)
    questions = [[*phrase, name] for name in names for phrase in phrases]
    vectors = question_vectors([make_example(question) for question in questions]).float()
    same_name = (vectors[0] @ vectors[1]).item()
    same_phrase = (vectors[0] @ vectors[2]).item()
    assert same_name > 2 * same_phrase > 0


@pytest.mark.parametrize("question", [(), (7,), (7, 7)], ids=["none", "of all rows", "repeated"])
def test_what_every_row_has_is_no_question(question):
    vectors = question_vectors([make_example(question), make_example(question)])
    assert not vectors.any()
    assert vectors.shape == (2, QUESTION_SIZE)


def test_what_is_learned_is_no_part_of_the_question():
    alike = question_vectors(
        [make_example((1, 2), (3,)), make_example((1, 2), (4,)), make_example((5,))]
    )
    assert (alike[0] == alike[1]).all()


def test_documents_have_no_question():
    """Their first token is not learned, for nothing predicts it."""
    texts = [[number, 5, 6, 7] for number in (11, 12, 13)]
    documents = [
        TokenizedExample(ids, [IGNORE_INDEX, *ids[1:]], Origin(Path("rows.txt"), 1))
        for ids in texts
    ]
    assert not question_vectors(documents).any()


def test_no_rows_have_no_vectors():
    assert question_vectors([]).shape == (0, QUESTION_SIZE)
