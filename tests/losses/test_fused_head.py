"""The fused head against full logits, in value and gradient."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from yrunner.losses import chunked_loss
from yrunner.losses.chunked_loss import chunk_rows, linear_targets, logit_targets, module_targets
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.targets import PLAIN, TokenWeight, sum_targets
from yrunner.losses.token_weights import EAFT_TOP, dft_weight, eaft_weight, nlirg_entropy_weight
from yrunner.losses.vocab_sweep import LogitForm, likeliest
from yrunner.models.meta import build_fake_model, fake_mode_of
from yrunner.recipe.schema.model import LoraTuning
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.memory.trace import LiveBytes

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FORMS = {
    "tied": dict(model_type="qwen3", head_dim=8, tie_word_embeddings=True),
    "untied": dict(model_type="qwen3", head_dim=8, tie_word_embeddings=False),
    "capped": dict(model_type="gemma2", head_dim=8, final_logit_softcapping=2.0),
    "multiplied": dict(model_type="cohere", logit_scale=0.0625),
    "divided": dict(model_type="granite", logits_scaling=8.0),
    "bias": dict(model_type="phi"),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4),
}


NLIRG = TokenWeight(lambda loss_N, _: nlirg_weight(loss_N))
WEIGHTS = {
    "plain": PLAIN,
    "nlirg": NLIRG,
    "nlirg_entropy": TokenWeight(nlirg_entropy_weight),
    "dft": TokenWeight(lambda loss_N, _: dft_weight(loss_N)),
    "eaft": TokenWeight(eaft_weight, top=EAFT_TOP),
}


def build(form="untied", seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**(SIZES | FORMS[form] | changes)), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    # Dropout would draw other numbers on each way.
    return model.eval()


def batch_of(seed=0, rows=3, length=17, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels_BT = ids_BT.clone()
    labels_BT[torch.rand(rows, length, generator=generator) >= share] = IGNORE_INDEX
    return {"input_ids": ids_BT, "labels": labels_BT}


def slow_targets(model, batch, weight):
    """Weighted loss, and loss and entropy of each target, from all logits of the model."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits.float()[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    logits_NV, labels_N = logits_BTV[labels_BT != IGNORE_INDEX], labels_BT[labels_BT != -100]
    loss_N = cross_entropy(logits_NV, labels_N, reduction="none")
    log_probability_NV = logits_NV.detach().log_softmax(-1)
    entropy_N = -(log_probability_NV.exp() * log_probability_NV).sum(-1)
    seen_N = entropy_N
    if weight.top:
        top_NK = log_probability_NV.exp().topk(weight.top).values
        top_NK = top_NK / top_NK.sum(-1, keepdim=True)
        seen_N = -(top_NK * top_NK.log()).sum(-1)
    weight_N = weight.of(loss_N.detach(), seen_N)
    return (weight_N * loss_N).sum(), loss_N, entropy_N, logits_NV, labels_N, weight_N


def gradients(model, loss):
    model.zero_grad()
    (loss / 7).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, batch, weight=NLIRG, rows=4, rtol=1e-4, atol=2e-5):
    """The fused and the slow way agree about everything; no gradient where none is wanted."""
    weighted, loss_N, entropy_N, logits_NV, labels_N, weight_N = slow_targets(model, batch, weight)
    slow = gradients(model, weighted)
    attach(model, rows=rows)
    targets = measure_targets(model, batch, weight, wants_top=True)
    fast = gradients(model, targets.weighted)
    close = dict(rtol=rtol, atol=atol)
    torch.testing.assert_close(targets.weighted, weighted, **close)
    torch.testing.assert_close(targets.loss_N, loss_N.detach(), **close)
    torch.testing.assert_close(targets.entropy_N, entropy_N, **close)
    torch.testing.assert_close(targets.weight_N, weight_N, **close)
    if rtol < 1e-3:
        hits_N = (logits_NV.argmax(-1) == labels_N).float()
        torch.testing.assert_close(targets.is_top_N, hits_N)
        assert torch.equal(targets.top_N, logits_NV.argmax(-1))
    pull_NV = logits_NV.detach().softmax(-1)
    pull_NV[torch.arange(len(labels_N)), labels_N] -= 1
    torch.testing.assert_close(targets.gradient_N, weight_N * pull_NV.norm(dim=-1), **close)
    assert set(fast) == set(slow)
    for name, gradient in slow.items():
        size = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(fast[name], gradient, rtol=rtol, atol=atol * size + 1e-7)
    return targets


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_fused_is_plain_for_every_form_of_head(form, weight, capsys):
    check_equal(build(form), batch_of(), WEIGHTS[weight])
    assert capsys.readouterr().err == "", "no form falls back"


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("form", ["untied", "capped", "divided", "bias"])
def test_fused_is_plain_with_the_kernel_of_a_gpu(form, weight, monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA build")
    monkeypatch.setattr(chunked_loss, "has_kernel", lambda _: True)
    check_equal(build(form), batch_of(), WEIGHTS[weight])


@pytest.mark.parametrize("form", ["tied", "capped", "divided", "bias"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["lora", "lora_on_head", "head_saved"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fused_is_plain_for_adapters(form, changes, capsys):
    model = get_peft_model(
        build(form), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **changes)
    ).eval()
    check_equal(model, batch_of())
    assert capsys.readouterr().err == ""


def record_gradients(monkeypatch):
    """The gradients that the chunks of a plain head are added to."""
    seen = []
    add = chunked_loss.LossAccumulator.add
    monkeypatch.setattr(
        chunked_loss.LossAccumulator,
        "add",
        lambda work, chunk: seen.append(work.gradients) or add(work, chunk),
    )
    return seen


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    seen = record_gradients(monkeypatch)
    model = build("bias")
    model.lm_head.requires_grad_(False)
    check_equal(model, batch_of())
    assert seen and all(grads[1] is None and grads[2] is None for grads in seen)


def test_without_gradients_none_is_computed(monkeypatch):
    seen = record_gradients(monkeypatch)
    model = build()
    attach(model)
    with torch.no_grad():
        assert not measure_targets(model, batch_of()).weighted.requires_grad
    assert seen and all(grads == [None] * 3 for grads in seen)


def test_gradient_checkpointing_changes_nothing():
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_equal(model.train(), batch_of())


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_autocast_agrees_up_to_its_rounding(form, capsys):
    model = build(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_equal(model, batch_of(), PLAIN, rtol=0.1, atol=0.1)
    assert capsys.readouterr().err == ""


def test_packed_rows_stay_apart():
    batch = batch_of(rows=1, length=30)
    batch["position_ids"] = torch.tensor([[*range(12), *range(18)]])
    check_equal(build(), batch)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_batch_without_a_target_has_a_loss_and_gradient_of_zero(targets):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
    for model in (build(), get_peft_model(build(), config).eval()):
        found = check_equal(model, batch_of(share=0.0))
        assert found.weighted.item() == 0
        assert sum_targets(found).tolist() == [0.0] * 15


@pytest.mark.parametrize("way", ["linear", "module"])
def test_a_refused_target_passes_on_nothing_that_is_not_a_number(way):
    head = nn.Linear(8, 11)
    hidden_ND = torch.randn(5, 8)
    hidden_ND[2] = float("nan")
    hidden_ND.requires_grad_()
    labels_N = torch.arange(5)
    run = {"linear": linear_targets, "module": module_targets}[way]
    targets = run(hidden_ND, head, labels_N, NLIRG, LogitForm(), 2)
    targets.weighted.backward()
    assert targets.weighted.isfinite()
    assert sum_targets(targets)[9] == 1
    if way == "linear":
        assert hidden_ND.grad.isfinite().all() and head.weight.grad.isfinite().all()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    chunk=st.integers(1, 40),
    weight=st.sampled_from(sorted(WEIGHTS)),
)
def test_fused_is_plain_for_any_shape_mask_and_chunk(seed, rows, length, share, chunk, weight):
    check_equal(build(seed=seed), batch_of(seed, rows, length, share), WEIGHTS[weight], chunk)


@given(
    scale=st.floats(0.1, 10),
    softcap=st.none() | st.floats(1, 30),
    size=st.floats(0.1, 30),
    chunk=st.integers(1, 9),
)
def test_both_ways_equal_logits_of_any_size(scale, softcap, size, chunk):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 13).double()
    hidden_ND = size * torch.randn(7, 6, generator=generator).double()
    labels_N = torch.randint(13, (7,), generator=generator)
    form = LogitForm(scale, softcap)
    found = []
    for run in (linear_targets, module_targets, None):
        own, own_ND = copy.deepcopy(head), hidden_ND.clone().requires_grad_()
        if run is None:
            targets = logit_targets(form.apply(own(own_ND)), labels_N, PLAIN)
        else:
            targets = run(own_ND, own, labels_N, PLAIN, form, chunk)
        targets.weighted.backward()
        found.append([targets.loss_N, own_ND.grad, own.weight.grad, own.bias.grad])
    for way in found[:2]:
        torch.testing.assert_close(way, found[2], rtol=1e-7, atol=1e-9)


def test_a_forbidden_token_leaves_the_entropy_a_number():
    logits_NV = torch.tensor([[1.0, 2.0, -float("inf")]])
    found = logit_targets(logits_NV, torch.tensor([0]), PLAIN, wants_top=True)
    expected = logit_targets(logits_NV[:, :2], torch.tensor([0]), PLAIN, wants_top=True)
    torch.testing.assert_close(vars(found), vars(expected))


def test_a_model_of_another_kind_falls_back_and_says_so_once(capsys):
    model = build()
    original = model.forward

    def odd(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    model.forward = odd
    for _ in range(2):
        check_equal(model, batch_of())
    assert capsys.readouterr().err.count("the loss uses full logits, which takes more memory") == 1


def test_dropout_makes_no_model_fall_back_and_draws_what_it_would(capsys):
    fused, plain = (build("gpt2").train() for _ in range(2))
    attach(fused)
    for _ in range(2):
        torch.manual_seed(5)
        targets = measure_targets(fused, batch_of())
        torch.manual_seed(5)
        torch.testing.assert_close(targets.loss_N, slow_targets(plain, batch_of(), PLAIN)[1])
    assert capsys.readouterr().err == ""


def test_attaching_twice_is_attaching_once():
    model = build()
    ids_BT = batch_of()["input_ids"]
    before = model(ids_BT).logits
    attach(model)
    forward = model.forward
    attach(model)
    assert model.forward is forward
    assert torch.equal(model(ids_BT).logits, before)
    assert model(ids_BT, labels=ids_BT).loss is not None


def peak_above_the_hidden_states(num_targets, on_head, rows):
    """Bytes of the loss's own tensors, forward and backward, at a large vocabulary."""
    tuning = LoraTuning(targets=["q_proj", "lm_head"] if on_head else "all-linear")
    config = AutoConfig.for_model(
        **(SIZES | FORMS["untied"] | dict(vocab_size=100_000, num_hidden_layers=1))
    )
    model = build_fake_model(config, tuning, dtype=torch.float32)
    head = model.get_output_embeddings()
    live = LiveBytes(fake_mode_of(model))
    live.assign([*model.parameters()], "weights")
    labels_N = torch.zeros(num_targets, dtype=torch.long)
    with live:
        with fake_mode_of(model):
            hidden_ND = torch.zeros(num_targets, 32, requires_grad=True)
        run = module_targets if on_head else linear_targets
        run(hidden_ND, head, labels_N, NLIRG, LogitForm(), rows).weighted.backward()
        return max(activations for _, activations in live.take_peaks())


@pytest.mark.parametrize("on_head", [False, True])
def test_memory_does_not_grow_with_targets_times_vocabulary(on_head):
    rows = 64 if on_head else chunk_rows(100_000)
    few, more, most = (
        peak_above_the_hidden_states(chunks * rows, on_head, rows) for chunks in (2, 8, 32)
    )
    per_target = (most - more) / (24 * rows)
    assert (more - few) / (6 * rows) == pytest.approx(per_target, rel=0.3)
    assert per_target < 1000, "a row of logits has 400,000 bytes"


@pytest.mark.parametrize("vocabulary_size", [1, 63, 64, 256, 1000])
def test_the_likeliest_token_is_the_first_with_the_largest_logit(vocabulary_size):
    # Few different numbers, so that several tokens of a row are equally likely.
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randint(-3, 3, (50, vocabulary_size), generator=generator).float()
    logits_NV[0] = -torch.inf
    slow = [row.index(max(row)) for row in logits_NV.tolist()]
    assert likeliest(logits_NV).tolist() == slow
