"""The fused head on a base in 4 bits, as QLoRA trains it, against full logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.losses.test_fused_head import batch_of, build, check_equal, gradients
from tests.losses.test_kl import check_gradients, slow_divergence, slow_log_probs
from yrunner.losses.fused_head import attach
from yrunner.losses.kl import measure_divergence
from yrunner.models.quantization import prevent_repacking
from yrunner.scoring.base_predictions import predictions_of_base


def load_in_four_bits(folder: Path, form: str, quantizes_head: bool) -> Any:
    # Weights are quantized in blocks of 64.
    build(form, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        # By default transformers leaves the head as it is.
        llm_int8_skip_modules=["embed_tokens"] if quantizes_head else None,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize(
    ("form", "quantizes_head"), [("tied", False), ("untied", False), ("untied", True)]
)
def test_fused_is_plain_on_a_base_in_four_bits(
    form: str, quantizes_head: bool, targets: Any, tmp_path: Path, capsys: Any
):
    model = load_in_four_bits(tmp_path, form, quantizes_head)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert isinstance(model.lm_head, Linear4bit) == quantizes_head
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=targets)
    # In eval mode, a processor that multiplies bfloat16 would pack the weights so that they can no
    # longer be trained through; there is no dropout here.
    check_equal(get_peft_model(model, config).train(), batch_of())
    assert "in full" not in capsys.readouterr().err, "no model falls back"


@pytest.mark.parametrize("quantizes_head", [False, True])
def test_the_base_in_four_bits_is_held_to_with_the_adapter_off(
    quantizes_head: bool, tmp_path: Path
):
    model, batch = load_in_four_bits(tmp_path, "untied", quantizes_head), batch_of()
    prevent_repacking(model)
    with torch.no_grad():
        log_base_NV = slow_log_probs(model, batch)
    config = LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, target_modules="all-linear")
    tuned = get_peft_model(model, config).train()
    attach(tuned, rows=4)
    base = predictions_of_base(tuned, batch, [0, 1, 2], tops=None)
    assert tuned.training
    for module in tuned.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    divergence_N = slow_divergence(tuned, batch, log_base_NV)
    found = measure_divergence(tuned, batch, base)
    torch.testing.assert_close(found.divergence_N, divergence_N, rtol=1e-4, atol=2e-5)
    check_gradients(tuned, gradients(tuned, divergence_N.sum()), gradients(tuned, found.total))
