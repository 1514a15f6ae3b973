"""KL through the fused head against full logits, in value and gradient."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from tests.losses.test_fused_head import FORMS, SIZES, VOCABULARY, batch_of, build, gradients
from yrunner.losses.fused_head import attach
from yrunner.losses.kl import (
    HiddenBase,
    TopBase,
    kl_full,
    kl_top,
    likeliest,
    measure_divergence,
    predict_base,
)
from yrunner.models.meta import build_fake_model, fake_mode_of
from yrunner.recipe.schema.model import FullTuning, LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory.trace import LiveBytes

CLOSE = dict(rtol=1e-4, atol=2e-5)
ADAPTERS = {
    "lora": dict(target_modules="all-linear"),
    "dora": dict(target_modules="all-linear", use_dora=True),
    "lora_on_head": dict(target_modules=["q_proj", "lm_head"]),
    "head_saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
WITHOUT_TARGETS = {
    "labels": torch.full((2, 9), IGNORE_INDEX),
    "input_ids": batch_of()["input_ids"][:2, :9],
}


def slow_log_probs(model, batch):
    """Log probabilities of each target, from full logits, shape [N, V]."""
    logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits.float()[:, :-1]
    return logits_BTV[batch["labels"][:, 1:] != IGNORE_INDEX].log_softmax(-1)


def slow_divergence(model, batch, log_base_NV):
    return (log_base_NV.exp() * (log_base_NV - slow_log_probs(model, batch))).sum(-1)


def adapted(form, dropout=0.0, **changes):
    config = LoraConfig(
        r=4, init_lora_weights=False, lora_dropout=dropout, task_type="CAUSAL_LM", **changes
    )
    return get_peft_model(build(form), config).eval()


def check_gradients(model, slow, fast):
    assert set(fast) == set(slow)
    for name, gradient in slow.items():
        size = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=3e-5 * size + 1e-7)


@pytest.mark.parametrize("form", ["tied", "capped", "divided", "bias"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_an_adapter_the_divergence_equals_that_of_full_logits(form, adapter):
    model, batch = adapted(form, **ADAPTERS[adapter]), batch_of()
    attach(model, rows=4)
    with model.disable_adapter():
        prediction = predict_base(model, batch)
        with torch.no_grad():
            log_base_NV = slow_log_probs(model, batch)
    divergence_N = slow_divergence(model, batch, log_base_NV)
    found = measure_divergence(model, batch, prediction)
    torch.testing.assert_close(found.divergence_N, divergence_N, **CLOSE)
    assert divergence_N.mean() > 1e-4, "the adapter must change something"
    slow, fast = gradients(model, divergence_N.sum()), gradients(model, found.total)
    check_gradients(model, slow, fast)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(fast) == trained, "the base gets no gradient"


@pytest.mark.parametrize("form", FORMS)
def test_the_adapter_switched_off_gives_the_logits_of_the_base_bit_for_bit(form):
    plain, batch = build(form), batch_of()
    before = plain(input_ids=batch["input_ids"], use_cache=False).logits
    model = get_peft_model(
        plain,
        LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.3, target_modules="all-linear"),
    )
    model.train()
    with model.disable_adapter():
        model.eval()
        off = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert torch.equal(off, before)
    assert not torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, before)


@pytest.mark.parametrize("form", ["tied", "untied", "capped", "divided", "bias"])
def test_with_all_weights_trained_the_likeliest_tokens_represent_the_base(form):
    base, model, batch = build(form, seed=1), build(form), batch_of()
    attach(base, rows=4)
    attach(model, rows=4)
    with torch.no_grad():
        log_base_NV = slow_log_probs(base, batch)
    divergence_N = slow_divergence(model, batch, log_base_NV)
    whole = measure_divergence(model, batch, predict_base(base, batch, top=VOCABULARY))
    torch.testing.assert_close(whole.divergence_N, divergence_N, **CLOSE)
    slow, fast = gradients(model, divergence_N.sum()), gradients(model, whole.total)
    check_gradients(model, slow, fast)


@pytest.mark.parametrize("top", [1, 5, 40])
def test_few_tokens_of_the_base_give_a_lower_bound(top):
    base, model, batch = build("untied", seed=1), build("untied"), batch_of()
    attach(base)
    attach(model)
    with torch.no_grad():
        log_base_NV = slow_log_probs(base, batch)
        log_tuned_NV = slow_log_probs(model, batch)
    tops = predict_base(base, batch, top=top)
    found = measure_divergence(model, batch, tops)
    # The slow way: all other tokens are one.
    rest_NV = torch.ones_like(log_base_NV).scatter(1, tops.ids_NK, 0.0)
    base_rest_N = (log_base_NV.exp() * rest_NV).sum(-1)
    tuned_rest_N = (log_tuned_NV.exp() * rest_NV).sum(-1)
    top_NK = log_base_NV.gather(1, tops.ids_NK)
    expected_N = (top_NK.exp() * (top_NK - log_tuned_NV.gather(1, tops.ids_NK))).sum(-1)
    expected_N += base_rest_N * (base_rest_N / tuned_rest_N).log()
    torch.testing.assert_close(found.divergence_N, expected_N, **CLOSE)
    true_N = (log_base_NV.exp() * (log_base_NV - log_tuned_NV)).sum(-1)
    assert (found.divergence_N <= true_N + 1e-5).all()
    assert (found.divergence_N < true_N - 1e-4).any(), "something must be missing"


def test_the_gradient_of_few_tokens_is_off_by_at_most_twice_the_mass_of_the_rest():
    chance = torch.Generator().manual_seed(0)
    final_NV, base_NV = torch.randn(2, 50, 97, generator=chance).mul(3)
    _, exact_NV = kl_full(final_NV, base_NV.log_softmax(-1))
    for number in (1, 8, 60, 97):
        top = likeliest(base_NV.log_softmax(-1), number)
        _, grad_NV = kl_top(final_NV, top)
        missed_N = (grad_NV - exact_NV).abs().sum(-1)
        assert (missed_N <= 2 * top.log_rest_N.exp() + 1e-5).all()
    assert missed_N.max() < 1e-5, "with all tokens nothing is missing"


def test_a_model_that_equals_its_base_has_no_divergence():
    model, batch = build("tied"), batch_of()
    attach(model)
    for prediction in (predict_base(model, batch), predict_base(model, batch, top=8)):
        found = measure_divergence(model, batch, prediction)
        assert found.divergence_N.abs().max() < 1e-5
        size = max(gradient.abs().max() for gradient in gradients(model, found.total).values())
        assert size < 1e-5


def test_a_model_whose_head_cannot_be_fused_has_the_same_divergence():
    base, model, batch = build("tied", seed=1), build("tied"), batch_of()
    for each in (base, model):
        attach(each)
        each.fused_head.fits = False
    with torch.no_grad():
        log_base_NV = slow_log_probs(base, batch)
    divergence_N = slow_divergence(model, batch, log_base_NV)
    for top in (None, VOCABULARY):
        found = measure_divergence(model, batch, predict_base(base, batch, top=top))
        torch.testing.assert_close(found.divergence_N, divergence_N.detach(), **CLOSE)
    check_gradients(model, gradients(model, divergence_N.sum()), gradients(model, found.total))


@pytest.mark.parametrize("on_head", [False, True])
def test_a_batch_without_a_target_has_no_divergence_and_trains_nothing(on_head):
    model = adapted("tied", target_modules=["q_proj", "lm_head"] if on_head else ["q_proj"])
    attach(model)
    for top in (None, 8):
        found = measure_divergence(
            model, WITHOUT_TARGETS, predict_base(model, WITHOUT_TARGETS, top)
        )
        assert found.total == 0 and not len(found.divergence_N)
        assert all(not gradient.any() for gradient in gradients(model, found.total).values())


def peak_above_the_hidden_states(num_targets, tuning, prediction_of):
    """Bytes of the divergence's tensors, forward and backward, with a large vocabulary."""
    config = AutoConfig.for_model(
        **(SIZES | FORMS["untied"] | dict(vocab_size=100_000, num_hidden_layers=1))
    )
    model = build_fake_model(config, tuning, dtype=torch.float32)
    attach(model, rows=256)
    live = LiveBytes(fake_mode_of(model))
    live.assign([*model.parameters()], "weights")
    batch = {
        "input_ids": torch.zeros(1, num_targets + 1, dtype=torch.long),
        "labels": torch.zeros(1, num_targets + 1, dtype=torch.long),
    }
    with live:
        with fake_mode_of(model):
            prediction = prediction_of(num_targets)
        measure_divergence(model, batch, prediction).total.backward()
        return max(activations for _, activations in live.take_peaks())


@pytest.mark.parametrize("kind", ["lora", "lora_on_head", "full"])
def test_memory_does_not_grow_with_targets_times_vocabulary(kind):
    tuning, prediction_of = {
        "lora": (LoraTuning(), lambda n: HiddenBase(torch.zeros(n, 32))),
        "lora_on_head": (
            LoraTuning(targets=["q_proj", "lm_head"]),
            lambda n: HiddenBase(torch.zeros(n, 32)),
        ),
        "full": (
            FullTuning(kind="full"),
            lambda n: TopBase(
                torch.zeros(n, 8, dtype=torch.long), torch.zeros(n, 8), torch.zeros(n)
            ),
        ),
    }[kind]
    few, most = (peak_above_the_hidden_states(n, tuning, prediction_of) for n in (512, 1024))
    assert (most - few) / 512 < 40_000, "a row of logits takes 400,000 bytes"
    assert math.isfinite(most)
