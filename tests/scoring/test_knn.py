"""Nearest neighbours against the slow way: one target at a time, in float64."""

import math
from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring import knn
from yrunner.scoring.knn import (
    NEIGHBOURS,
    NO_SUGGESTION,
    OWN_COSINE,
    OWN_COSINE_OF_QUESTIONS,
    PEER_TEMPERATURE,
    PEERS,
    PRIOR,
    QUESTION_SHARE,
    TEMPERATURE,
    Neighbours,
)
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.questions import question_vectors
from yrunner.scoring.suspicious_spans import FEWEST_NATS
from yrunner.tokens import IGNORE_INDEX

SIZE = 6
PLACE = Origin(Path("rows.jsonl"), 1)


def make_example(ids, num_context):
    return TokenizedExample(ids, [IGNORE_INDEX] * num_context + ids[num_context:], PLACE)


def make_scores(loss_N, context_NC):
    rest_N = torch.zeros(len(loss_N))
    return TokenScores(loss_N, rest_N, rest_N, rest_N.long(), PLACE, context_NC.half())


def make_corpus(num_rows, vocabulary, seed=0):
    """Rows of random ids, contexts and losses; one in four is a copy of another."""
    torch.manual_seed(seed)
    examples, scores, groups = [], [], []
    for number in range(num_rows):
        if number % 4 == 3:
            examples.append(examples[number // 2])
            scores.append(scores[number // 2])
            groups.append(groups[number // 2])
            continue
        size = int(torch.randint(2, 9, ()))
        question = torch.randint(100, 104, (int(torch.randint(3, ())),)).tolist()
        ids = [0, *question, *torch.randint(vocabulary, (size,)).tolist()]
        examples.append(make_example(ids, len(question) + 2))
        scores.append(make_scores(torch.rand(size - 1) * 5, torch.randn(size - 1, SIZE)))
        groups.append(str(number))
    return examples, scores, groups


def places_of(examples, scores, groups):
    """Group, question, token before, token and context of every target, in order."""
    questions = question_vectors(examples).float()
    return [
        (
            groups[row],
            row,
            questions[row],
            example.input_ids[at - 1],
            example.input_ids[at],
            scored.context_NC[n].double(),
        )
        for row, (example, scored) in enumerate(zip(examples, scores, strict=True))
        for n, at in enumerate(example.target_positions)
    ]


def neighbours_of(places, with_question):
    """For each target, the others that may be neighbours: cosine, token, place."""
    centre = torch.stack([context for *_, context in places]).mean(dim=0)
    for group, _, question, previous, _, context in places:
        found = []
        for place, (other, _, theirs, before, token, there) in enumerate(places):
            if other != group and before == previous:
                cosine = torch.cosine_similarity(context - centre, there - centre, dim=0).item()
                if with_question and question.any():
                    cosine -= QUESTION_SHARE * (1 - (question @ theirs).item())
                found.append((cosine, token, place))
        yield sorted(found, reverse=True)


def slow_lookup(examples, scores, groups, questions_help=False):
    """Loss, suggested token and the example that suggests it, of every target, in order."""
    places = places_of(examples, scores, groups)
    losses = torch.cat([scored.loss_N for scored in scores]).tolist()
    found = []
    for loss, (*_, target, _), near in zip(
        losses, places, neighbours_of(places, questions_help), strict=True
    ):
        votes = near[:NEIGHBOURS]
        total = {}
        for cosine, token, _ in votes:
            total[token] = total.get(token, 0.0) + math.exp((cosine - 1) / TEMPERATURE)
        own_cosine = OWN_COSINE_OF_QUESTIONS if questions_help else OWN_COSINE
        own = math.exp((own_cosine - 1) / TEMPERATURE)
        whole = sum(total.values()) + own
        likeliest = max(total, key=total.__getitem__, default=NO_SUGGESTION)
        is_other = total.get(likeliest, 0) > whole / 2 and likeliest != target
        probability = (total.get(target, 0.0) + own * math.exp(-loss)) / whole
        against = next((place for _, token, place in votes if token == likeliest), None)
        found.append(
            (
                -math.log(probability),
                likeliest if is_other else NO_SUGGESTION,
                places[against][1] if is_other else NO_SUGGESTION,
            )
        )
    return found


def slow_deviations(examples, scores, groups, losses):
    """Standard deviations of every loss from those of its peers, in order."""
    places = places_of(examples, scores, groups)
    middle = sum(losses) / len(losses)
    spread = sum((loss - middle) ** 2 for loss in losses) / len(losses)
    found = []
    for loss, near in zip(losses, neighbours_of(places, False), strict=True):
        peers = [(1.0, losses[place], near[0][0] - cosine) for cosine, _, place in near[:PEERS]]
        weights = [math.exp(-distance / PEER_TEMPERATURE) for *_, distance in peers]
        whole = sum(weights) + PRIOR
        expected = sum(w * theirs for w, (_, theirs, _) in zip(weights, peers, strict=True))
        expected = (expected + PRIOR * middle) / whole
        squares = sum(
            w * (theirs - expected) ** 2 for w, (_, theirs, _) in zip(weights, peers, strict=True)
        )
        deviation = max(FEWEST_NATS, math.sqrt((squares + PRIOR * spread) / whole))
        found.append((loss - expected) / deviation)
    return found


def look_up(examples, scores, groups, seed=0):
    """Losses, suggested tokens and who suggests them, of all targets."""
    lookups = Neighbours(examples, scores, groups, seed).look_up()
    losses = torch.cat([torch.empty(0), *(one.loss_N for one in lookups)]).tolist()
    none = torch.empty(0, dtype=torch.long)
    suggested = torch.cat([none, *(one.suggested_N for one in lookups)]).tolist()
    return losses, suggested, torch.cat([none, *(one.against_N for one in lookups)]).tolist()


@pytest.mark.parametrize("questions_help", [False, True])
@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 5), (40, 2), (40, 4), (60, 30)])
def test_neighbours_are_those_of_the_slow_way(num_rows, vocabulary, questions_help, monkeypatch):
    # Several blocks of rows, and of cosines.
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 50)
    monkeypatch.setattr(knn, "COSINES_AT_ONCE", 300)
    corpus = make_corpus(num_rows, vocabulary)
    monkeypatch.setattr(Neighbours, "questions_help", questions_help)
    losses, suggested, against = look_up(*corpus)
    expected = slow_lookup(*corpus, questions_help)
    assert losses == pytest.approx([loss for loss, *_ in expected], rel=1e-3, abs=1e-4)
    assert suggested == [token for _, token, _ in expected]
    groups = corpus[2]
    for one, (_, _, other) in zip(against, expected, strict=True):
        # Copies of a row suggest the same.
        assert one == other or groups[one] == groups[other]


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 5), (40, 2), (60, 30)])
def test_losses_are_compared_with_those_of_the_slow_way(num_rows, vocabulary, monkeypatch):
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 50)
    monkeypatch.setattr(knn, "COSINES_AT_ONCE", 300)
    monkeypatch.setattr(knn, "PEERS", 5)
    monkeypatch.setitem(globals(), "PEERS", 5)
    corpus = make_corpus(num_rows, vocabulary)
    losses = [scored.loss_N for scored in corpus[1]]
    found = torch.cat(Neighbours(*corpus, seed=0).compare(losses)).tolist()
    expected = slow_deviations(*corpus, torch.cat(losses).tolist())
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-2)


def fact_rows(answers):
    """Rows that ask for the same: equal contexts, and these answers."""
    context_NC = torch.zeros(1, SIZE)
    context_NC[0, 0] = 1
    other_NC = torch.zeros(1, SIZE)
    other_NC[0, 1] = 1
    examples = [make_example([1, answer], 1) for answer in answers]
    scores = [make_scores(torch.tensor([4.0]), context_NC) for _ in answers]
    # Something else, so that the mean of all contexts is not the fact's own.
    examples += [make_example([1, 99], 1)] * len(answers)
    scores += [make_scores(torch.tensor([4.0]), other_NC) for _ in answers]
    return examples, scores, [str(number) for number in range(len(examples))]


def test_a_row_that_contradicts_the_others_gets_their_token_as_suggestion():
    losses, suggested, against = look_up(*fact_rows([7, 7, 7, 7, 8]))
    assert max(losses[:4]) < 0.3, "three of four neighbours agree"
    assert losses[4] > 4, "worse than the model alone"
    assert suggested[:5] == [NO_SUGGESTION] * 4 + [7]
    assert against[:4] == [NO_SUGGESTION] * 4
    assert against[4] in range(4)


def test_a_copy_does_not_confirm_a_fault():
    examples, scores, groups = fact_rows([7, 7, 7, 8, 8])
    groups[4] = groups[3]
    losses, *_ = look_up(examples, scores, groups)
    assert losses[3] == losses[4] > 4


def asking(question, answer):
    """A row whose answer follows the same token whatever it asks."""
    ids = [0, *question, 1, answer]
    return TokenizedExample(ids, [IGNORE_INDEX] * (len(ids) - 1) + [answer], PLACE)


@pytest.mark.parametrize(
    ("own", "other", "contradicts"),
    [([50], [50], True), ([50, 2], [50, 3], True), ([50], [51], False), ([], [51], True)],
    ids=["the same", "mostly the same", "another", "none"],
)
def test_a_row_is_contradicted_by_rows_that_ask_the_same(own, other, contradicts, monkeypatch):
    monkeypatch.setattr(Neighbours, "questions_help", True)
    # Tokens 2 and 3 are in half of the rows, as the words of questions are.
    fillers = [asking([60 + number, 2 + number % 2], 99) for number in range(20)]
    examples = [asking(own, 8), asking(other, 7), asking(other, 7), *fillers]
    fact_NC, filler_NC = torch.eye(SIZE)[:1], torch.eye(SIZE)[1:2]
    scores = [
        make_scores(torch.tensor([2.0]), context) for context in [fact_NC] * 3 + [filler_NC] * 20
    ]
    losses, suggested, _ = look_up(examples, scores, [str(number) for number in range(23)])
    assert (losses[0] > 3) == contradicts
    assert (suggested[0] == 7) == contradicts


@pytest.mark.parametrize("num_names", [1, 30], ids=["one answer", "an answer for each name"])
def test_questions_help_where_answers_depend_on_what_they_name(num_names):
    """Contexts are equal, so only the questions tell which rows should agree."""
    examples = [asking([200 + row % 30, 2 + row % 2], 300 + row % num_names) for row in range(120)]
    scores = [make_scores(torch.tensor([3.0]), torch.randn(1, SIZE) * 0.1 + 1) for _ in examples]
    # Something else, so that the mean of all contexts is not theirs.
    examples += [asking([], 99)] * 120
    scores += [make_scores(torch.tensor([3.0]), -torch.ones(1, SIZE))] * 120
    groups = [str(number) for number in range(240)]
    assert Neighbours(examples, scores, groups, seed=0).questions_help == (num_names > 1)


def test_a_loss_that_all_similar_places_have_is_expected():
    """A name is news in every row; the word after it in none."""
    examples = [make_example([1, 10 + number, 5, 30], 1) for number in range(12)]
    scores = [make_scores(torch.tensor([6.0, 0.1, 0.1]), torch.eye(3, SIZE)) for _ in examples]
    losses = [scored.loss_N.clone() for scored in scores]
    losses[3][2] = 6.0
    neighbours = Neighbours(examples, scores, [str(number) for number in range(12)], seed=0)
    found = neighbours.compare(losses)
    name, _, end = found[3].tolist()
    assert found[0].abs().max() < 1
    assert end > 3
    assert abs(name) < 1


def test_a_target_without_neighbours_keeps_the_loss_of_the_model():
    losses = torch.tensor([0.5, 6.0])
    contexts = torch.eye(2, SIZE)
    alone = make_example([1, 2, 3], 1), make_example([4, 5, 6], 1)
    scores = make_scores(losses, contexts), make_scores(losses, -contexts)
    found, suggested, against = look_up(alone, scores, ["a", "b"])
    assert found == pytest.approx([0.5, 6.0, 0.5, 6.0])
    assert suggested == against == [NO_SUGGESTION] * 4
    compared = Neighbours(alone, scores, ["a", "b"], seed=0).compare([losses, losses])
    # Their peers are all targets of the corpus: 2.75 above and below the mean.
    assert torch.cat(compared).tolist() == pytest.approx([-1, 1, -1, 1])


def test_losses_that_are_not_finite_stay_so_and_affect_no_other():
    examples, scores, groups = fact_rows([7, 7, 7])
    scores[0] = make_scores(torch.tensor([torch.nan]), scores[0].context_NC)
    scores[1] = make_scores(torch.tensor([torch.inf]), scores[1].context_NC)
    losses, *_ = look_up(examples, scores, groups)
    assert math.isnan(losses[0])
    assert losses[1] == math.inf
    assert all(map(math.isfinite, losses[2:]))
    neighbours = Neighbours(examples, scores, groups, seed=0)
    compared = torch.cat(neighbours.compare([scored.loss_N for scored in scores]))
    assert compared.isfinite().all()


def test_of_a_large_corpus_only_a_part_is_stored_but_all_rows_are_looked_up(monkeypatch):
    corpus = make_corpus(60, 3)
    monkeypatch.setattr(knn, "MOST_STORED", 60)
    monkeypatch.setattr(knn, "MOST_CANDIDATES", 5)
    once, again = (look_up(*corpus, seed=1) for _ in range(2))
    assert once == again
    assert len(once[0]) == sum(len(scored.loss_N) for scored in corpus[1])
    assert all(map(math.isfinite, once[0]))
    compared = Neighbours(*corpus, seed=1).compare([scored.loss_N for scored in corpus[1]])
    assert [len(one) for one in compared] == [len(scored.loss_N) for scored in corpus[1]]
    assert torch.cat(compared).isfinite().all()


def test_rows_without_targets_have_empty_lookups():
    empty = make_example([1, 2], 2)
    nothing = make_scores(torch.empty(0), torch.empty(0, SIZE))
    assert look_up([empty], [nothing], ["a"]) == ([], [], [])
    assert look_up([], [], []) == ([], [], [])
    assert Neighbours([empty], [nothing], ["a"], seed=0).compare([torch.empty(0)])[0].shape == (0,)
    assert Neighbours([], [], [], seed=0).compare([]) == []
