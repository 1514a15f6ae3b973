"""The gauge of forgetting against the slow way, and what is made of its course."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.training.test_replay_loss import slow_divergences
from yrunner.recipe.schema.recipe import EarlyStopping
from yrunner.scoring.base_predictions import CachedPredictions, cache_predictions
from yrunner.training.callbacks import Cadence
from yrunner.training.drift import DriftGauge, count_stalled, drift_warning
from yrunner.training.metrics import read_metrics

STILL = [(1.0, 0.1), (0.9, 0.2), (0.95, 0.3), (0.9, 0.4)]
"""Loss and drift of validations: from the second on, nothing is gained."""


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_drift_is_the_mean_divergence_of_all_tokens_whatever_the_batches(
    make_model, examples, capitals_tokenizer, max_tokens, tmp_path
):
    base, pad = make_model(), capitals_tokenizer.pad_token_id
    rows = examples[:7]
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(make_model(), config).eval()
    slow = torch.cat([slow_divergences(tuned, base, row) for row in rows]).mean().item()
    assert DriftGauge(rows, None, pad, max_tokens).measure(tuned) == pytest.approx(slow, rel=1e-4)
    tops = cache_predictions(base, rows, top=10_000, pad_token_id=pad, max_tokens=max_tokens)
    tops.save(tmp_path / "tops.safetensors")
    kept = CachedPredictions.load(tmp_path / "tops.safetensors")
    assert DriftGauge(rows, kept, pad, max_tokens).measure(tuned) == pytest.approx(slow, rel=1e-4)
    assert tuned.training is False


def test_every_validation_measures_drift_and_a_base_has_none(
    make_model, examples, make_trainer, capitals_tokenizer
):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    pad = capitals_tokenizer.pad_token_id
    gauge = DriftGauge(examples[20:24], None, pad, 1000)
    assert gauge.measure(model) == pytest.approx(0, abs=1e-6)
    trainer = make_trainer(model, examples[:8], examples[10:12], learning_rate=0.01, epochs=2)
    trainer.objective.gauge = gauge
    trainer.train()
    found = [
        row["eval_drift"] for row in read_metrics(trainer.run_dir.metrics) if "eval_loss" in row
    ]
    assert len(found) == 2
    assert 1e-6 < found[0] < found[1]


@pytest.mark.parametrize(
    ("validations", "expected"),
    [([], 0), (STILL[:1], 0), (STILL[:2], 0), (STILL[:3], 1), (STILL, 2), ([*STILL, (0.8, 1)], 0)],
)
def test_a_run_stalls_where_drift_rises_and_the_loss_gains_nothing(validations, expected):
    assert count_stalled(validations) == expected
    assert len(drift_warning(validations)) == min(1, expected)


def test_drift_that_falls_is_no_stall():
    assert count_stalled([(1.0, 0.1), (1.0, 0.3), (1.0, 0.2)]) == 0


def test_a_run_stops_when_it_has_stalled_for_so_long():
    for patience, stops in ((2, True), (3, False)):
        history = [{"eval_loss": loss, "eval_drift": drift} for loss, drift in STILL]
        cadence = Cadence(9, early_stopping=EarlyStopping(patience=patience, metric="drift"))
        assert cadence.stops_early([{"loss": 1.0}, *history]) is stops
