"""Two short models say of a deep one what running all of it says."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig

from benchmarks.memory import TUNINGS, full_batch
from tests.models.conftest import tiny_config
from yrunner.models.meta import build_fake_model
from yrunner.training.memory.trace import GrownTrace, StepTrace, trace_step, trace_update

OPTIONS = {"dtype": torch.bfloat16, "optimizer": "adamw_torch", "foreach": True}


@pytest.mark.parametrize(
    ("tuning", "recomputes", "layers"),
    [("lora", True, 2), ("lora", False, 1), ("freeze", False, 2)],
)
def test_a_deep_model_needs_what_two_short_ones_predict(tuning: str, recomputes: bool, layers: int):
    sizes = tiny_config("qwen3") | {"num_hidden_layers": 8}
    if tuning == "lora":
        sizes |= {"hidden_size": 256, "intermediate_size": 1024}  # an adapter trains few weights
    config = AutoConfig.for_model(**sizes, vocab_size=320)
    build = partial(build_fake_model, tuning=TUNINGS[tuning], dtype=torch.bfloat16)
    batch = full_batch(2, 64, num_targets=16)
    options = {**OPTIONS, "gradient_checkpointing": recomputes}
    grown = trace_update(build(config), build, batch, **options)
    whole = trace_step(build(config), batch, **options)
    assert isinstance(grown, GrownTrace)
    assert grown.short_layers == layers
    assert isinstance(whole, StepTrace)
    assert grown.weights == pytest.approx(whole.weights, rel=0.01)
    assert grown.optimizer == pytest.approx(whole.optimizer, rel=0.01)
    assert grown.updating == pytest.approx(whole.updating, rel=0.01)
    for share in (0.0, 0.5, 1.0):
        assert sum(grown.busiest_compute(share)) == pytest.approx(
            sum(whole.busiest_compute(share)), rel=0.02
        )


def test_a_model_whose_layers_differ_is_run_as_a_whole():
    sizes = tiny_config("qwen3") | {"num_hidden_layers": 8}
    config = AutoConfig.for_model(**sizes, vocab_size=320)

    def build_with_a_wide_end(config):
        model = build_fake_model(config, TUNINGS["full"], dtype=torch.float32)
        if config.num_hidden_layers == 8:
            wide = AutoConfig.for_model(**sizes | {"intermediate_size": 4096}, vocab_size=320)
            wider = build_fake_model(wide, TUNINGS["full"], dtype=torch.float32)
            model.model.layers[7] = wider.model.layers[7]
        return model

    whole = build_with_a_wide_end(config)
    batch = full_batch(1, 8, num_targets=4)
    traced = trace_update(whole, build_with_a_wide_end, batch, dtype=torch.float32, optimizer="sgd")
    assert isinstance(traced, StepTrace)
