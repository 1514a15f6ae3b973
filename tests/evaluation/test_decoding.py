"""The choice of the next token, against what probability says."""

import numpy as np
import pytest
import torch

from yrunner.evaluation.generate import DrawnToken, FreedomByEntropy, choosers
from yrunner.recipe.schema.eval import BeamWriting, DynamicWriting, GreedyWriting, SampleWriting

NO_IDS = torch.empty(0)


def entropy(logits_V):
    probability_V = logits_V.softmax(-1)
    return float(-(probability_V * probability_V.log()).sum())


def test_tokens_are_drawn_by_their_probability():
    probability_V = torch.tensor([0.1, 0.0, 0.6, 0.3])
    scores_BV = probability_V.log().expand(4000, -1)
    drawn_BV = DrawnToken([(0, number) for number in range(4000)])(NO_IDS, scores_BV)
    shares_V = torch.bincount(drawn_BV.argmax(-1), minlength=4) / 4000
    assert shares_V[1] == 0
    torch.testing.assert_close(shares_V, probability_V, atol=0.03, rtol=0)


def test_a_question_draws_the_same_in_any_company_and_another_at_each_step():
    scores_BV = torch.zeros(3, 1000)
    together, alone = DrawnToken([(7, 0), (7, 1), (7, 2)]), DrawnToken([(7, 1)])
    steps = [
        (together(NO_IDS, scores_BV).argmax(-1)[1].item(), alone(NO_IDS, scores_BV[:1]).argmax())
        for _ in range(5)
    ]
    assert all(one == other for one, other in steps)
    assert len({one for one, _ in steps}) > 1


def test_sampling_leaves_the_tokens_that_transformers_would():
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, -1.0, -4.0]])
    kinds = {
        (0, 1): SampleWriting(kind="sample", top_k=2),
        (0, 1, 2): SampleWriting(kind="sample", temperature=1, top_p=0.95),
        (0,): SampleWriting(kind="sample", temperature=1, min_p=0.5),
        (0, 1, 2, 3, 4): SampleWriting(kind="sample", temperature=1),
    }
    for kept, generation in kinds.items():
        scores_BV = logits_BV
        for step in choosers(generation, [(0, 0)])[:-1]:
            scores_BV = step(NO_IDS, scores_BV)
        assert tuple(torch.isfinite(scores_BV[0]).nonzero().squeeze(1).tolist()) == kept


def test_a_low_temperature_sharpens():
    scores_BV = torch.tensor([[1.0, 0.0]])
    (warm,) = choosers(SampleWriting(kind="sample", temperature=0.25), [(0, 0)])[:-1]
    torch.testing.assert_close(warm(NO_IDS, scores_BV), torch.tensor([[4.0, 0.0]]))


def test_dynamic_is_greedy_where_the_model_is_sure_and_free_where_it_is_not():
    step = FreedomByEntropy(greedy_below=0.5, free_above=1.0, temperature=0.5, top_k=3)
    sure = torch.tensor([8.0, 1.0, 0.0, 0.0])
    unsure = torch.tensor([1.3, 1.2, 1.1, 1.0])
    between = torch.tensor([2.0, 0.0, -1.0, -9.0])
    freedom = (entropy(between) - 0.5) / 0.5
    assert entropy(sure) < 0.5 < 0.5 + 0.25 * freedom < 1 < entropy(unsure)
    sure_V, unsure_V, between_V = step(NO_IDS, torch.stack([sure, unsure, between]))
    assert torch.isfinite(sure_V).sum() == 1
    assert sure_V.argmax() == 0
    torch.testing.assert_close(unsure_V[:3], unsure[:3] / 0.5)
    assert unsure_V[3] == -torch.inf
    num_left = 1 + round(freedom * 2)
    assert torch.isfinite(between_V).sum() == num_left
    torch.testing.assert_close(between_V[0], between[0] / (freedom * 0.5), rtol=1e-4, atol=0)


def test_greedy_and_beams_leave_the_logits_as_they_are():
    for generation in (GreedyWriting(), BeamWriting(kind="beams")):
        assert not choosers(generation, [(0, 0)])
    assert len(choosers(DynamicWriting(kind="dynamic"), [(0, 0)])) == 2


@pytest.mark.parametrize("size", [1, 7])
def test_drawing_survives_a_chance_next_to_one(size, monkeypatch):
    class Highest:
        def random(self):
            return float(np.nextafter(1, 0))

    step = DrawnToken([(0, 0)])
    monkeypatch.setattr(step, "_chances", [Highest()])
    assert step(NO_IDS, torch.zeros(1, size)).argmax() == size - 1
