"""The estimate of an update's memory against real training, and the rules of sharing it out."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from benchmarks.memory import TUNINGS, Case, estimated_bytes, full_batch, measured_bytes
from tests.models.conftest import MODEL_TYPES, tiny_config
from yrunner.models.meta import build_fake_model
from yrunner.models.tuning import count_parameters
from yrunner.recipe.schema.model import FullTuning, LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory.trace import StepTrace, Untraceable, trace_step

SMALL = Case("qwen3", "full", hidden_size=256, num_layers=4, vocab_size=16_000, length=256)
MEASURED = [
    replace(SMALL, tuning="lora", gradient_checkpointing=True, num_targets=250),
    replace(SMALL, tuning="freeze", accumulation=2),
    SMALL,
]


def trace(model_type: str = "qwen3", tuning: str = "full", **keys: object) -> StepTrace:
    config = AutoConfig.for_model(**tiny_config(model_type), vocab_size=320)
    model = build_fake_model(config, TUNINGS[tuning], dtype=torch.float32)
    options = {"dtype": torch.float32, "optimizer": "adamw_torch"} | keys
    result = trace_step(model, full_batch(2, 64, num_targets=16), **options)
    assert isinstance(result, StepTrace)
    return result


@pytest.fixture(scope="module")
def measured() -> dict[Case, int]:
    """The peaks of real trainings; the memory of each returns to the system before the next."""
    return dict(zip(MEASURED, measured_bytes(*MEASURED), strict=True))


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.tuning)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(
    case: Case, measured: dict[Case, int]
):
    assert estimated_bytes(case) == pytest.approx(measured[case], rel=0.25)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_full_tuning_with_adam_holds_every_weight_four_times(model_type: str):
    config = AutoConfig.for_model(**tiny_config(model_type), vocab_size=320)
    model = build_fake_model(config, FullTuning(kind="full"), dtype=torch.float32)
    num_bytes = 4 * count_parameters(model)[1]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    traced = trace(model_type, foreach=True)
    assert traced.weights == num_bytes + buffers
    assert traced.optimizer == pytest.approx(2 * num_bytes, rel=0.01)
    assert max(gradients for gradients, _ in traced.while_updating) == num_bytes


def test_all_weights_at_once_need_working_memory_for_all_of_them():
    one_by_one, at_once = trace(foreach=False), trace(foreach=True)
    gradients, activations = max(at_once.while_updating)
    assert activations >= gradients
    assert max(one_by_one.while_updating)[1] < activations


def test_lora_needs_less_than_full_tuning():
    lora, full = trace(tuning="lora"), trace(tuning="full")
    assert lora.optimizer < full.optimizer / 2
    assert max(lora.while_updating) < max(full.while_updating)


def test_gradient_checkpointing_needs_fewer_activations():
    stored, computed_twice = trace(), trace(gradient_checkpointing=True)
    assert computed_twice.busiest_compute()[1] < stored.busiest_compute()[1]


def test_under_accumulation_gradients_are_there_from_the_start():
    first_gradients = [min(trace(accumulation=n).while_computing)[0] for n in (1, 2)]
    assert first_gradients[0] == 0
    assert first_gradients[1] == max(trace().while_updating)[0]


def test_half_precision_keeps_a_copy_of_the_trained_weights_for_autocast():
    config = AutoConfig.for_model(**tiny_config("qwen3"), vocab_size=320)
    model = build_fake_model(config, FullTuning(kind="full"), dtype=torch.bfloat16)
    half = trace_step(model, full_batch(1, 2, num_targets=1), dtype=torch.bfloat16, optimizer="sgd")
    linear = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert isinstance(half, StepTrace)
    copies = 2 * (linear - 320 * 32)
    assert min(half.while_computing)[1] > copies
    without = min(half.without_copies)[1]
    assert min(half.while_computing)[1] - without == pytest.approx(copies, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_every_optimizer_of_the_recipe_can_be_traced(optimizer: str):
    remembered = trace(optimizer=optimizer).optimizer
    weights = trace().weights
    bounds = {"sgd": (0, 0), "adafactor": (1, weights / 2)}
    low, high = bounds.get(optimizer, (1.9 * weights, 2.1 * weights))
    assert low <= remembered <= high


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma2", "gpt2", "mamba"])
def test_other_forms_can_be_traced(model_type: str):
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    model = build_fake_model(config, FullTuning(kind="full"), dtype=torch.bfloat16)
    batch = full_batch(1, 16, num_targets=8)
    traced = trace_step(model, batch, dtype=torch.bfloat16, optimizer="adamw_torch")
    assert isinstance(traced, StepTrace)


def test_a_model_that_looks_at_its_values_is_named_untraceable(capfd: pytest.CaptureFixture[str]):
    config = AutoConfig.for_model(**tiny_config("qwen3"), vocab_size=320)
    model = build_fake_model(config, LoraTuning(), dtype=torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].sum().item())
    traced = trace_step(
        model, full_batch(1, 8, num_targets=4), dtype=torch.float32, optimizer="sgd"
    )
    assert isinstance(traced, Untraceable)
    assert traced.reason.startswith("what it computes depends on computed values (aten.")
    assert capfd.readouterr().err == ""


def test_the_first_token_of_a_row_is_no_target():
    labels_BT = full_batch(2, 8, num_targets=8)["labels"]
    assert (labels_BT != IGNORE_INDEX).sum(dim=1).tolist() == [7, 7]


def test_tracing_leaves_torch_as_it_was():
    before = torch.get_rng_state()
    trace()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.ones(2) + 1) is torch.Tensor
    assert torch.empty(1).device.type == "cpu"
