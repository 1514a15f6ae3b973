"""Log-probabilities of targets against full logits, in value and for any gradient per target."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from tests.losses.test_fused_head import FORMS, SIZES, batch_of, build
from yrunner.losses import chunked_loss
from yrunner.losses.chunked_loss import chunk_rows
from yrunner.losses.fused_head import attach
from yrunner.losses.log_probs import (
    LogProbRequest,
    linear_log_probs,
    logit_log_probs,
    measure_log_probs,
    module_log_probs,
)
from yrunner.losses.vocab_sweep import LogitForm
from yrunner.models.meta import build_fake_model, fake_mode_of
from yrunner.recipe.schema.model import LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory.trace import LiveBytes

ADAPTERS = {
    "lora": dict(target_modules="all-linear"),
    "lora_on_head": dict(target_modules=["q_proj", "lm_head"]),
    "head_saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def slow_log_probs(model, batch, temperature=1.0):
    """Log-probability and entropy of each target, from all logits of the model."""
    logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    is_target_BT = labels_BT != IGNORE_INDEX
    log_NV = (logits_BTV[is_target_BT] / temperature).log_softmax(-1)
    log_prob_N = log_NV.gather(1, labels_BT[is_target_BT][:, None]).squeeze(1)
    return log_prob_N, -(log_NV.exp() * log_NV).sum(-1).detach()


def any_loss(log_prob_N):
    """Its gradient per target depends on the values, has both signs, and is 0 for one of them."""
    factor_N = torch.linspace(-2, 3, len(log_prob_N), dtype=log_prob_N.dtype)
    factor_N[: 1 if len(factor_N) else 0] = 0
    return (factor_N * log_prob_N).sum() ** 2 + (factor_N * log_prob_N.exp()).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, batch, temperature=1.0, rows=4, **close):
    close = close or dict(rtol=1e-9, atol=1e-9)
    log_prob_N, entropy_N = slow_log_probs(model, batch, temperature)
    slow = gradients(model, any_loss(log_prob_N))
    attach(model, rows=rows)
    found = measure_log_probs(model, batch, LogProbRequest(temperature))
    torch.testing.assert_close(found.log_prob_N, log_prob_N, **close)
    torch.testing.assert_close(found.entropy_N, entropy_N, **close)
    assert not found.entropy_N.requires_grad
    fast = gradients(model, any_loss(found.log_prob_N))
    assert set(fast) == set(slow)
    for name, gradient in slow.items():
        size = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(
            fast[name], gradient, rtol=close["rtol"], atol=close["atol"] * size
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_head_gives_the_log_probabilities_of_its_logits(form, temperature, capsys):
    check_equal(build(form).double(), batch_of(), temperature)
    assert capsys.readouterr().err == "", "no form falls back"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("form", ["tied", "capped", "divided", "bias"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_give_the_log_probabilities_of_their_logits(form, adapter, capsys):
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[adapter])
    check_equal(get_peft_model(build(form), config).double().eval(), batch_of(), 1.3)


def test_a_model_of_another_kind_gives_them_from_its_own_logits(capsys):
    model = build().double()
    original = model.forward

    def forward(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    model.forward = forward
    check_equal(model, batch_of(), 0.8)
    assert "full logits" in capsys.readouterr().err


def test_a_gradient_of_zero_hides_whatever_a_target_has():
    hidden_ND = torch.randn(3, 4, dtype=torch.float64)
    hidden_ND[1] = torch.nan
    hidden_ND.requires_grad_()
    head = torch.nn.Linear(4, 6, dtype=torch.float64)
    found = linear_log_probs(hidden_ND, head, torch.tensor([0, 1, 2]), LogitForm(), 2)
    found.log_prob_N[[0, 2]].sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert hidden_ND.grad.isfinite().all() and (hidden_ND.grad[1] == 0).all()


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("weight", "bias")])
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.4), LogitForm(1.7, 3.0)])
def test_gradients_agree_with_finite_differences(form, frozen):
    torch.manual_seed(0)
    hidden_ND = torch.randn(5, 4, dtype=torch.float64, requires_grad="hidden" not in frozen)
    head = torch.nn.Linear(4, 7, dtype=torch.float64)
    for name in {"weight", "bias"} & set(frozen):
        getattr(head, name).requires_grad_(False)
    labels_N = torch.tensor([3, 0, 6, 6, 1])
    moved = [tensor for tensor in (hidden_ND, *head.parameters()) if tensor.requires_grad]

    def log_probs(*_):
        return linear_log_probs(hidden_ND, head, labels_N, form, 2).log_prob_N

    assert torch.autograd.gradcheck(log_probs, moved)


@pytest.mark.parametrize("plain", [True, False])
def test_without_a_target_every_weight_gets_a_gradient_of_zero(plain):
    hidden_ND = torch.randn(0, 4, requires_grad=True)
    head, labels_N = torch.nn.Linear(4, 7), torch.empty(0, dtype=torch.long)
    way = linear_log_probs if plain else module_log_probs
    found = way(hidden_ND, head, labels_N, LogitForm(), 8)
    assert found.log_prob_N.shape == found.entropy_N.shape == (0,)
    found.log_prob_N.sum().backward()
    assert hidden_ND.grad.shape == (0, 4)
    assert all((p.grad == 0).all() for p in head.parameters())


def test_a_forbidden_token_leaves_the_entropy_finite():
    logits_NV = torch.randn(2, 5, dtype=torch.float64)
    logits_NV[0, 2] = -torch.inf
    found = logit_log_probs(logits_NV, torch.tensor([1, 2]))
    log_NV = logits_NV.log_softmax(-1)
    torch.testing.assert_close(found.log_prob_N, log_NV[[0, 1], [1, 2]])
    kept = log_NV[0][[0, 1, 3, 4]]
    assert found.entropy_N[0].item() == pytest.approx(-(kept.exp() * kept).sum().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["tied", "capped", "bias"])
def test_half_precision_is_near_and_keeps_log_probabilities_in_float32(form, dtype):
    model = build(form)
    batch = batch_of()
    log_prob_N, _ = slow_log_probs(model, batch)
    slow = gradients(model, any_loss(log_prob_N))
    attach(model, rows=4)
    with torch.autocast("cpu", dtype=dtype):
        found = measure_log_probs(model, batch)
    assert found.log_prob_N.dtype == torch.float32
    fast = gradients(model, any_loss(found.log_prob_N))
    torch.testing.assert_close(found.log_prob_N, log_prob_N, rtol=0.05, atol=0.1)
    for name, gradient in slow.items():
        assert (fast[name] - gradient).norm() < 0.15 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("form", ["untied", "capped", "bias"])
def test_the_kernel_of_a_gpu_gives_the_same(form, monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA build")
    monkeypatch.setattr(chunked_loss, "has_kernel", lambda _: True)
    check_equal(build(form), batch_of(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("way", ["frozen", "trained", "lora"])
def test_memory_does_not_grow_with_targets_times_vocabulary(way):
    rows = 64 if way == "lora" else chunk_rows(100_000)
    few, more, most = (peak_bytes(chunks * rows, way, rows) for chunks in (2, 8, 32))
    per_target = (most - more) / (24 * rows)
    assert (more - few) / (6 * rows) == pytest.approx(per_target, rel=0.3)
    assert per_target < 1000, "a row of logits has 400,000 bytes"


def peak_bytes(num_targets, way, rows):
    """Most bytes of activations at once, for a head of a large vocabulary."""
    config = AutoConfig.for_model(
        **(SIZES | FORMS["untied"] | dict(vocab_size=100_000, num_hidden_layers=1))
    )
    targets = ["q_proj", "lm_head"] if way == "lora" else "all-linear"
    model = build_fake_model(config, LoraTuning(targets=targets), dtype=torch.float32)
    head = model.get_output_embeddings()
    if way == "trained":
        head.weight.requires_grad_()
    live = LiveBytes(fake_mode_of(model))
    live.assign([*model.parameters()], "weights")
    labels_N = torch.zeros(num_targets, dtype=torch.long)
    with live:
        with fake_mode_of(model):
            hidden_ND = torch.zeros(num_targets, 32, requires_grad=True)
        run = module_log_probs if way == "lora" else linear_log_probs
        run(hidden_ND, head, labels_N, LogitForm(), rows).log_prob_N.sum().backward()
        return max(activations for _, activations in live.take_peaks())
