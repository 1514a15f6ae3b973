"""A classifier is made of a trained language model, also where its weights are held elsewhere."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from yrunner.losses.score_head import SCORE, add_score_head, attach_scores, measure_scores
from yrunner.models.reward import as_classifier

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def scoring(model):
    torch.manual_seed(1)
    add_score_head(model)
    attach_scores(model)
    return model.eval()


def score(model) -> float:
    with torch.no_grad():
        return measure_scores(model, {"input_ids": IDS}, torch.tensor([4])).item()


def loaded_score(folder: Path) -> float:
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return classifier(IDS).logits.item()


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_weights_that_the_model_does_not_hold_are_saved_in_place_of_its_own(
    make_model, tmp_path, model_type
):
    """As of ZeRO-3, where rank 0 gets all of them by name."""
    trained = scoring(make_model(seed=3, model_type=model_type))
    weights = {name: weight.clone() for name, weight in trained.state_dict().items()}
    expected = score(trained)
    held = scoring(make_model(seed=4, model_type=model_type))
    classifier, saved = as_classifier(held, 0, torch.float32, weights)
    assert not any("lm_head" in name for name in saved)
    classifier.save_pretrained(tmp_path, state_dict=saved)
    assert loaded_score(tmp_path) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_is_merged_with_the_trained_weights_that_are_given(make_model, tmp_path):
    """As of ZeRO 1 and 2, which hold rounded ones."""

    def adapted():
        config = LoraConfig(
            r=4,
            target_modules="all-linear",
            modules_to_save=[SCORE],
            exclude_modules=[SCORE],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(scoring(make_model(seed=3)), config).eval()

    trained = adapted()
    expected = score(trained)
    trained_weights = {
        name: parameter.detach().clone()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }
    held = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in held.named_parameters():
            if name in trained_weights:
                parameter.zero_()
    classifier, saved = as_classifier(held, 0, torch.float32, trained_weights)
    assert saved is None
    classifier.save_pretrained(tmp_path)
    assert loaded_score(tmp_path) == pytest.approx(expected, abs=1e-5)
