"""The formula for the operations of a micro-batch matches torch's counter."""

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import TUNINGS, full_batch
from benchmarks.scaling.operations import Attention, count_operations
from tests.models.conftest import tiny_config
from tests.training.memory.test_zero import COUNTS
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.models.size import count_weights_of
from yrunner.models.tuning import apply_tuning

ROWS, LENGTH, TARGETS = 2, 64, 16


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_formula_matches_the_counter(tuning: str, recomputes: bool):
    config = AutoConfig.for_model(
        **tiny_config("qwen3"), vocab_size=320, attn_implementation="eager"
    )
    model = apply_tuning(AutoModelForCausalLM.from_config(config), TUNINGS[tuning]).train()
    if recomputes:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    attach(model)
    batch = full_batch(ROWS, LENGTH, TARGETS)
    measure_targets(model, batch)  # the first batch also computes the full logits, to compare
    with FlopCounterMode(display=False) as counter:
        measure_targets(model, batch).weighted.backward()
    attention = Attention(config.num_hidden_layers, config.num_attention_heads * config.head_dim)
    counted = count_operations(
        count_weights_of(model),
        attention,
        rows=ROWS,
        length=LENGTH,
        targets=ROWS * TARGETS,
        # The counter misses products that are added in place, such as the head's gradient.
        trains_head=False,
        recomputes=recomputes,
    )
    # Eager attention also computes masked positions, once forward and twice backward.
    hidden = 2 * ROWS * LENGTH * (LENGTH - 1) * attention.width * attention.layers
    whole = counted.total + hidden * (3 + recomputes)
    # The formula also counts two parts that torch skips: the gradient of the first layer's input
    # where nothing before it is trained, and the last matrix of a recomputed layer.
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_trained_head_costs_one_more_product():
    frozen, trained = (
        count_operations(
            COUNTS, Attention(2, 64), rows=1, length=8, targets=5, trains_head=trains_head
        )
        for trains_head in (False, True)
    )
    assert trained.total - frozen.total == 2 * 5 * COUNTS.head
