"""Neighbours of a target against the slow way: one target at a time, in float64."""

import math
from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring import knn as neighbours
from yrunner.scoring.knn import NEIGHBOURS, NOTHING, OWN_LIKENESS, TEMPERATURE, look_up
from yrunner.scoring.measure import TokenScores
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
        ids = torch.randint(vocabulary, (size,)).tolist()
        examples.append(make_example(ids, 1))
        scores.append(make_scores(torch.rand(size - 1) * 5, torch.randn(size - 1, SIZE)))
        groups.append(str(number))
    return examples, scores, groups


def slow_lookup(examples, scores, groups):
    """Loss and told token of every target, in order."""
    places = [
        (
            groups[row],
            example.input_ids[at - 1],
            example.input_ids[at],
            scored.context_NC[n].double(),
        )
        for row, (example, scored) in enumerate(zip(examples, scores, strict=True))
        for n, at in enumerate(example.target_positions)
    ]
    losses = torch.cat([scored.loss_N for scored in scores]).tolist()
    centre = torch.stack([context for *_, context in places]).mean(dim=0)
    found = []
    for loss, (group, previous, target, context) in zip(losses, places, strict=True):
        said = []
        for other, before, token, theirs in places:
            if other != group and before == previous:
                cosine = torch.cosine_similarity(context - centre, theirs - centre, dim=0)
                said.append((cosine.item(), token))
        said = sorted(said, reverse=True)[:NEIGHBOURS]
        say = {}
        for cosine, token in said:
            say[token] = say.get(token, 0.0) + math.exp((cosine - 1) / TEMPERATURE)
        own = math.exp((OWN_LIKENESS - 1) / TEMPERATURE)
        whole = sum(say.values()) + own
        likeliest = max(say, key=say.__getitem__, default=NOTHING)
        is_told = say.get(likeliest, 0) > whole / 2 and likeliest != target
        probability = (say.get(target, 0.0) + own * math.exp(-loss)) / whole
        found.append((-math.log(probability), likeliest if is_told else NOTHING))
    return found


def joined(lookups):
    lookups = list(lookups)
    losses = torch.cat([one.loss_N for one in lookups]).tolist()
    return losses, torch.cat([one.told_N for one in lookups]).tolist()


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 5), (40, 2), (40, 4), (60, 30)])
def test_neighbours_are_those_of_the_slow_way(num_rows, vocabulary, monkeypatch):
    # Several blocks of rows, and of cosines.
    monkeypatch.setattr(neighbours, "ASKED_AT_ONCE", 50)
    monkeypatch.setattr(neighbours, "BLOCK", 300)
    corpus = make_corpus(num_rows, vocabulary)
    losses, told = joined(look_up(*corpus, seed=0))
    expected = slow_lookup(*corpus)
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-3, abs=1e-4)
    assert told == [token for _, token in expected]


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


def test_the_one_row_that_says_otherwise_is_told_what_the_others_say():
    losses, told = joined(look_up(*fact_rows([7, 7, 7, 7, 8]), seed=0))
    assert max(losses[:4]) < 0.3, "three of four neighbours agree"
    assert losses[4] > 4, "worse than by the model alone"
    assert told[:5] == [NOTHING] * 4 + [7]


def test_a_copy_does_not_confirm_a_fault():
    examples, scores, groups = fact_rows([7, 7, 7, 8, 8])
    groups[4] = groups[3]
    losses, _ = joined(look_up(examples, scores, groups, seed=0))
    assert losses[3] == losses[4] > 4


def test_where_nothing_is_alike_the_loss_of_the_model_stands():
    losses = torch.tensor([0.5, 6.0])
    contexts = torch.eye(2, SIZE)
    alone = make_example([1, 2, 3], 1), make_example([4, 5, 6], 1)
    scores = make_scores(losses, contexts), make_scores(losses, -contexts)
    found, told = joined(look_up(alone, scores, ["a", "b"], seed=0))
    assert found == pytest.approx([0.5, 6.0, 0.5, 6.0])
    assert told == [NOTHING] * 4


def test_losses_that_are_no_numbers_stay_so_and_harm_no_other():
    examples, scores, groups = fact_rows([7, 7, 7])
    scores[0] = make_scores(torch.tensor([torch.nan]), scores[0].context_NC)
    scores[1] = make_scores(torch.tensor([torch.inf]), scores[1].context_NC)
    losses, _ = joined(look_up(examples, scores, groups, seed=0))
    assert math.isnan(losses[0])
    assert losses[1] == math.inf
    assert all(map(math.isfinite, losses[2:]))


def test_of_a_large_corpus_a_part_is_remembered_and_all_rows_are_asked_for(monkeypatch):
    corpus = make_corpus(60, 3)
    monkeypatch.setattr(neighbours, "MOST_REMEMBERED", 60)
    monkeypatch.setattr(neighbours, "MOST_COMPARED", 5)
    once, again = (joined(look_up(*corpus, seed=1)) for _ in range(2))
    assert once == again
    assert len(once[0]) == sum(len(scored.loss_N) for scored in corpus[1])
    assert all(map(math.isfinite, once[0]))


def test_rows_without_targets_are_no_trouble():
    empty = make_example([1, 2], 2)
    nothing = make_scores(torch.empty(0), torch.empty(0, SIZE))
    assert joined(look_up([empty], [nothing], ["a"], seed=0)) == ([], [])
    assert list(look_up([], [], [], seed=0)) == []
