"""The figures of a record, against a loop over all targets with all their logits."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.training.conftest import LOSSES
from yrunner.losses.nlirg import ZONES, zone_of
from yrunner.training.arguments import token_weight
from yrunner.training.metrics import SignalMeter, read_metrics

DOCUMENT = Path(__file__).parents[2] / "docs/guide/losses.md"
SPREAD = 16.0
"""Makes a model surer than it has reason to be, so that losses of all sizes occur."""
LOG_TABLE = re.compile(r"^## What is logged$.*?^\|---.*?\n(.*?)\n\n", re.MULTILINE | re.DOTALL)


def slow_entropy(logits_V, top=None):
    """Entropy of the prediction, or of its likeliest tokens alone."""
    probability_V = torch.softmax(logits_V, dim=0).sort(descending=True).values[:top]
    probability_V = probability_V / probability_V.sum()
    return -sum(p * math.log(p) for p in probability_V.tolist() if p > 0)


def slow_figures(model, examples, loss):
    """Loss, entropy, weight, hit and pull of every target, one after the other."""
    weight, _ = token_weight(LOSSES[loss])
    model.eval()
    for example in examples:
        with torch.no_grad():
            logits_TV = model(torch.tensor([example.input_ids])).logits[0].double()
        for place in example.target_positions:
            logits_V = logits_TV[place - 1].requires_grad_()
            loss_of_target = cross_entropy(logits_V, torch.tensor(example.labels[place]))
            (pull_V,) = torch.autograd.grad(loss_of_target, logits_V)
            entropy = slow_entropy(logits_V.detach(), weight.top)
            seen = loss_of_target.detach()[None], torch.tensor([entropy], dtype=torch.float64)
            weight_of_target = weight.of(*seen).item()
            hit = logits_V.argmax().item() == example.labels[place]
            pull = weight_of_target * pull_V.norm().item()
            yield seen[0].item(), slow_entropy(logits_V.detach()), weight_of_target, hit, pull


@pytest.mark.parametrize("loss", LOSSES)
def test_every_figure_of_a_record_is_that_of_all_its_targets(
    make_model, examples, make_trainer, loss
):
    model = make_model()
    make_trainer(model, examples[6:], folder="short", max_steps=8, learning_rate=1e-2).train()
    model.model.norm.weight.data.mul_(SPREAD)
    rows = list(slow_figures(model, examples[:6], loss))
    columns = torch.tensor(rows, dtype=torch.float64).T
    loss_N, entropy_N, weight_N, hit_N, pull_N = columns
    trainer = make_trainer(
        model, examples[:6], loss=loss, batch_size=2, gradient_accumulation_steps=3
    )
    trainer.train()
    (record,) = read_metrics(trainer.run_dir.metrics)
    zone_N = zone_of(loss_N)
    assert set(zone_N.tolist()) == {0, 1, 2, 3}, "the targets must spread over all zones"
    expected = {
        "loss": loss_N.mean(),
        "weighted_loss": (weight_N * loss_N).mean(),
        "mean_weight": weight_N.mean(),
        "entropy": entropy_N.mean(),
        "accuracy": hit_N.mean(),
        "refused": (weight_N == 0).double().mean(),
        "targets": len(rows),
    }
    for place, zone in enumerate(ZONES):
        expected[f"zone_{zone}"] = (zone_N == place).double().mean()
        expected[f"gradient_{zone}"] = pull_N[zone_N == place].sum() / pull_N.sum()
    assert {name: record[name] for name in expected} == {
        name: pytest.approx(float(value), rel=1e-4, abs=1e-7) for name, value in expected.items()
    }


def test_records_of_zeros_have_figures_too():
    meter = SignalMeter()
    meter.add(torch.zeros(15, dtype=torch.float64))
    record = meter.drain()
    assert {record[name] for name in ("loss", "mean_weight", "gradient_hard", "targets")} == {0}


def test_the_document_names_every_figure_that_is_logged(make_model, examples, make_trainer):
    trainer = make_trainer(make_model(), examples[4:8], examples[:4], loss="nlirg")
    trainer.train()
    logged = {key for record in read_metrics(trainer.run_dir.metrics) for key in record}
    (table,) = LOG_TABLE.findall(DOCUMENT.read_text("utf-8"))
    named = {
        key for line in table.split("\n") for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == logged
