"""Nearest neighbours against the slow way: one target at a time, in float64."""

import math
from pathlib import Path

import pytest
import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.scoring import knn
from yrunner.scoring.knn import NEIGHBOURS, NO_SUGGESTION, OWN_COSINE, TEMPERATURE, look_up
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
    """Loss and suggested token of every target, in order."""
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
        votes = []
        for other, before, token, theirs in places:
            if other != group and before == previous:
                cosine = torch.cosine_similarity(context - centre, theirs - centre, dim=0)
                votes.append((cosine.item(), token))
        votes = sorted(votes, reverse=True)[:NEIGHBOURS]
        total = {}
        for cosine, token in votes:
            total[token] = total.get(token, 0.0) + math.exp((cosine - 1) / TEMPERATURE)
        own = math.exp((OWN_COSINE - 1) / TEMPERATURE)
        whole = sum(total.values()) + own
        likeliest = max(total, key=total.__getitem__, default=NO_SUGGESTION)
        is_other = total.get(likeliest, 0) > whole / 2 and likeliest != target
        probability = (total.get(target, 0.0) + own * math.exp(-loss)) / whole
        found.append((-math.log(probability), likeliest if is_other else NO_SUGGESTION))
    return found


def joined(lookups):
    lookups = list(lookups)
    losses = torch.cat([one.loss_N for one in lookups]).tolist()
    return losses, torch.cat([one.suggested_N for one in lookups]).tolist()


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 5), (40, 2), (40, 4), (60, 30)])
def test_neighbours_are_those_of_the_slow_way(num_rows, vocabulary, monkeypatch):
    # Several blocks of rows, and of cosines.
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 50)
    monkeypatch.setattr(knn, "COSINES_AT_ONCE", 300)
    corpus = make_corpus(num_rows, vocabulary)
    losses, suggested = joined(look_up(*corpus, seed=0))
    expected = slow_lookup(*corpus)
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-3, abs=1e-4)
    assert suggested == [token for _, token in expected]


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
    losses, suggested = joined(look_up(*fact_rows([7, 7, 7, 7, 8]), seed=0))
    assert max(losses[:4]) < 0.3, "three of four neighbours agree"
    assert losses[4] > 4, "worse than the model alone"
    assert suggested[:5] == [NO_SUGGESTION] * 4 + [7]


def test_a_copy_does_not_confirm_a_fault():
    examples, scores, groups = fact_rows([7, 7, 7, 8, 8])
    groups[4] = groups[3]
    losses, _ = joined(look_up(examples, scores, groups, seed=0))
    assert losses[3] == losses[4] > 4


def test_a_target_without_neighbours_keeps_the_loss_of_the_model():
    losses = torch.tensor([0.5, 6.0])
    contexts = torch.eye(2, SIZE)
    alone = make_example([1, 2, 3], 1), make_example([4, 5, 6], 1)
    scores = make_scores(losses, contexts), make_scores(losses, -contexts)
    found, suggested = joined(look_up(alone, scores, ["a", "b"], seed=0))
    assert found == pytest.approx([0.5, 6.0, 0.5, 6.0])
    assert suggested == [NO_SUGGESTION] * 4


def test_losses_that_are_not_finite_stay_so_and_affect_no_other():
    examples, scores, groups = fact_rows([7, 7, 7])
    scores[0] = make_scores(torch.tensor([torch.nan]), scores[0].context_NC)
    scores[1] = make_scores(torch.tensor([torch.inf]), scores[1].context_NC)
    losses, _ = joined(look_up(examples, scores, groups, seed=0))
    assert math.isnan(losses[0])
    assert losses[1] == math.inf
    assert all(map(math.isfinite, losses[2:]))


def test_of_a_large_corpus_only_a_part_is_stored_but_all_rows_are_looked_up(monkeypatch):
    corpus = make_corpus(60, 3)
    monkeypatch.setattr(knn, "MOST_STORED", 60)
    monkeypatch.setattr(knn, "MOST_CANDIDATES", 5)
    once, again = (joined(look_up(*corpus, seed=1)) for _ in range(2))
    assert once == again
    assert len(once[0]) == sum(len(scored.loss_N) for scored in corpus[1])
    assert all(map(math.isfinite, once[0]))


def test_rows_without_targets_have_empty_lookups():
    empty = make_example([1, 2], 2)
    nothing = make_scores(torch.empty(0), torch.empty(0, SIZE))
    assert joined(look_up([empty], [nothing], ["a"], seed=0)) == ([], [])
    assert list(look_up([], [], [], seed=0)) == []
