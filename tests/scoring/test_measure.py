"""The scores of every target, against all logits of one example at a time."""

import pytest
import torch

from tests.training.conftest import LOSSES
from yrunner.scoring.measure import score_tokens
from yrunner.training.arguments import token_weight


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_each_target_alone_in_order(make_model, examples, batch_size):
    model = make_model().train()
    weight, _ = token_weight(LOSSES["nlirg_entropy"])
    scores = score_tokens(model, examples[:7], pad_token_id=0, batch_size=batch_size, weight=weight)
    for example, scored in zip(examples[:7], scores, strict=True):
        model.eval()
        places = torch.tensor(example.target_positions)
        with torch.no_grad():
            logits_TV = model(torch.tensor([example.input_ids])).logits[0]
        logs_NV = logits_TV[places - 1].log_softmax(-1)
        labels_N = torch.tensor(example.labels)[places]
        loss_N = -logs_NV[torch.arange(len(places)), labels_N]
        entropy_N = -(logs_NV.exp() * logs_NV).sum(-1)
        torch.testing.assert_close(scored.loss_N, loss_N)
        torch.testing.assert_close(scored.entropy_N, entropy_N)
        torch.testing.assert_close(scored.weight_N, weight.of(loss_N, entropy_N))
        assert torch.equal(scored.top_N, logs_NV.argmax(-1))
        assert scored.origin == example.origin


def test_a_model_in_training_goes_on_in_training(make_model, examples):
    model = make_model().train()
    list(score_tokens(model, examples[:2], pad_token_id=0, batch_size=1))
    assert model.training
