"""Student and teacher in one sweep against full logits and F.kl_div, in value and gradient."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div

from tests.losses.test_fused_head import VOCABULARY, batch_of, build, gradients
from tests.losses.test_kl import ADAPTERS, WITHOUT_TARGETS, adapted, check_gradients
from yrunner.losses.distillation import Lesson, TeacherDivergence
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.kl import likeliest, predict_base
from yrunner.losses.targets import PLAIN, TokenWeight
from yrunner.tokens import IGNORE_INDEX

MEASURES = {
    "forward_kl": TeacherDivergence("forward_kl"),
    "forward_kl_at_2": TeacherDivergence("forward_kl", temperature=2.0),
    "reverse_kl": TeacherDivergence("reverse_kl"),
    "reverse_kl_at_0.7": TeacherDivergence("reverse_kl", temperature=0.7),
    "jsd": TeacherDivergence("jsd"),
    "jsd_0.1_at_3": TeacherDivergence("jsd", beta=0.1, temperature=3.0),
    "jsd_0.9": TeacherDivergence("jsd", beta=0.9),
}
COMMON = 90
"""Ids that student and teacher are compared on, where their vocabularies differ."""
each_measure = pytest.mark.parametrize("divergence", MEASURES.values(), ids=MEASURES)
HALF = TokenWeight(lambda loss_N, _: 0.5 + 0.1 * loss_N)
"""A weight that depends on the loss."""


def slow(divergence, student_NV, teacher_NV):
    """The divergence of each target with torch's own function."""
    size = divergence.num_tokens
    student_NV = (student_NV[:, :size] / divergence.temperature).log_softmax(-1)
    teacher_NV = (teacher_NV[:, :size] / divergence.temperature).log_softmax(-1)

    def kl(left_NV, right_NV):
        return kl_div(right_NV, left_NV, reduction="none", log_target=True).sum(-1)

    if divergence.by == "forward_kl":
        return kl(teacher_NV, student_NV)
    if divergence.by == "reverse_kl":
        return kl(student_NV, teacher_NV)
    beta = divergence.beta
    mixed_NV = (beta * teacher_NV.exp() + (1 - beta) * student_NV.exp()).log()
    return beta * kl(teacher_NV, mixed_NV) + (1 - beta) * kl(student_NV, mixed_NV)


def two_logits(seed=0, number=40, size=97, scale=3.0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, size, generator=chance, dtype=torch.float64).mul(scale)


@each_measure
def test_value_and_gradient_equal_those_of_kl_div_in_float64(divergence):
    student_NV, teacher_NV = two_logits()
    student_NV.requires_grad_()
    expected_N = slow(divergence, student_NV, teacher_NV)
    (expected_NV,) = torch.autograd.grad(expected_N.sum(), student_NV)
    found_N, found_NV = divergence.of_logits(student_NV.detach(), teacher_NV.clone())
    torch.testing.assert_close(found_N, expected_N.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-10, atol=1e-13)


@each_measure
def test_equal_predictions_have_no_divergence_and_no_gradient(divergence):
    student_NV, _ = two_logits()
    found_N, found_NV = divergence.of_logits(student_NV, student_NV.clone())
    assert found_N.abs().max() < 1e-13
    assert found_NV.abs().max() < 1e-13


@each_measure
def test_a_prediction_far_from_the_teacher_stays_finite(divergence):
    student_NV, teacher_NV = two_logits(scale=300.0)
    found_N, found_NV = divergence.of_logits(student_NV.float(), teacher_NV.float())
    assert found_N.isfinite().all() and found_NV.isfinite().all()
    top = likeliest((teacher_NV.float() / divergence.temperature).log_softmax(-1), 4)
    found_N, found_NV = divergence.of_top(student_NV.float(), top)
    assert found_N.isfinite().all() and found_NV.isfinite().all()


@each_measure
@pytest.mark.parametrize("number", [1, 4, 60])
def test_few_tokens_of_the_teacher_give_the_divergence_of_the_coarser_distributions(
    divergence, number
):
    student_NV, teacher_NV = two_logits()
    student_NV.requires_grad_()
    true_N = slow(divergence, student_NV, teacher_NV)
    log_teacher_NV = (teacher_NV / divergence.temperature).log_softmax(-1)
    top = likeliest(log_teacher_NV.clone(), number)

    def coarse(log_NV):
        rest_NV = log_NV.scatter(1, top.ids_NK, -math.inf)
        return torch.cat([log_NV.gather(1, top.ids_NK), rest_NV.logsumexp(1, True)], dim=1)

    log_student_NV = (student_NV / divergence.temperature).log_softmax(-1)
    # Log-probabilities are logits, whose temperature has been applied.
    at_one = TeacherDivergence(divergence.by, divergence.beta)
    expected_N = slow(at_one, coarse(log_student_NV), coarse(log_teacher_NV))
    (expected_NV,) = torch.autograd.grad(expected_N.sum(), student_NV)
    found_N, found_NV = divergence.of_top(student_NV.detach(), top)
    torch.testing.assert_close(found_N, expected_N.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-8, atol=1e-12)
    assert (found_N <= true_N.detach() + 1e-12).all(), "never above the true divergence"
    assert (found_N < true_N.detach() - 1e-3).any(), "something must be missing"


@each_measure
def test_all_tokens_of_the_teacher_give_the_true_divergence(divergence):
    student_NV, teacher_NV = two_logits()
    top = likeliest((teacher_NV / divergence.temperature).log_softmax(-1), 97)
    for found, expected in zip(
        divergence.of_top(student_NV, top),
        divergence.of_logits(student_NV, teacher_NV.clone()),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by", ["forward_kl", "reverse_kl", "jsd"])
def test_only_the_common_ids_are_compared(by):
    student_NV, _ = two_logits(size=97)
    _, teacher_NV = two_logits(size=104)
    divergence = TeacherDivergence(by, num_tokens=90)
    found_N, found_NV = divergence.of_logits(student_NV, teacher_NV.clone())
    expected_N = slow(divergence, student_NV, teacher_NV)
    torch.testing.assert_close(found_N, expected_N)
    assert found_NV.shape == (40, 90)
    garbage_NV = teacher_NV.clone()
    garbage_NV[:, 90:] = 1e4
    torch.testing.assert_close(divergence.of_logits(student_NV, garbage_NV)[0], expected_N)


def teacher_and_lesson(batch, divergence, *, top=None, rows=None, **options):
    """A teacher with other sizes than the student's, its full logits, and what it says."""
    divergence = replace(divergence, num_tokens=COMMON)
    teacher = build("untied", seed=9, hidden_size=48, vocab_size=VOCABULARY + 7)
    attach(teacher, rows=4)
    with torch.no_grad():
        logits_NV = target_logits(teacher, batch)
    prediction = predict_base(
        teacher, batch, top, temperature=divergence.temperature, num_tokens=divergence.num_tokens
    )
    head = None if top else teacher.fused_head.base_head()
    options = {"label_factor": 0.3, "teacher_factor": 0.7} | options
    return logits_NV, Lesson(prediction, head, divergence, **options)


def target_logits(model, batch):
    logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits.float()[:, :-1]
    return logits_BTV[batch["labels"][:, 1:] != IGNORE_INDEX]


def slow_loss(model, batch, lesson, teacher_NV, weight):
    """Both parts from full logits."""
    student_NV = target_logits(model, batch)
    labels_N = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    loss_N = torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="none")
    weight_N = weight.of(loss_N.detach(), loss_N.detach())
    divergence_N = slow(lesson.divergence, student_NV, teacher_NV)
    is_label_N = 1.0 if lesson.is_label_N is None else lesson.is_label_N.float()
    of_labels = (weight_N * is_label_N * loss_N).sum() * lesson.label_factor
    of_teacher = (divergence_N * (weight_N if lesson.weighs else 1.0)).sum()
    return of_labels + of_teacher * lesson.teacher_factor, divergence_N


@each_measure
@pytest.mark.parametrize("form", ["tied", "untied", "capped", "divided", "bias"])
def test_one_sweep_gives_the_loss_and_gradients_of_full_logits(divergence, form):
    model, batch = build(form), batch_of()
    attach(model, rows=4)
    teacher_NV, lesson = teacher_and_lesson(batch, divergence)
    expected, divergence_N = slow_loss(model, batch, lesson, teacher_NV, HALF)
    found = measure_targets(model, batch, HALF, lesson=lesson)
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.divergence_N, divergence_N, rtol=1e-4, atol=2e-6)
    check_gradients(model, gradients(model, expected), gradients(model, found.weighted))
    alone = measure_targets(model, batch, HALF)
    for name in ("loss_N", "entropy_N", "weight_N", "is_top_N", "gradient_N"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), msg=name)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_the_student_learns_the_same(adapter, weighs):
    model, batch = adapted("tied", **ADAPTERS[adapter]), batch_of()
    attach(model, rows=4)
    chosen_N = torch.arange(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())) % 3 > 0
    options = dict(weighs=weighs, is_label_N=chosen_N)
    teacher_NV, lesson = teacher_and_lesson(batch, TeacherDivergence("jsd", beta=0.3), **options)
    expected, _ = slow_loss(model, batch, lesson, teacher_NV, HALF)
    found = measure_targets(model, batch, HALF, lesson=lesson)
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=1e-6)
    check_gradients(model, gradients(model, expected), gradients(model, found.weighted))


@each_measure
def test_the_teachers_likeliest_tokens_teach_in_the_same_sweep(divergence):
    model, batch = build("untied"), batch_of()
    attach(model, rows=4)
    teacher_NV, lesson = teacher_and_lesson(batch, divergence, top=VOCABULARY)
    expected, _ = slow_loss(model, batch, lesson, teacher_NV, PLAIN)
    found = measure_targets(model, batch, PLAIN, lesson=lesson)
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=1e-6)
    check_gradients(model, gradients(model, expected), gradients(model, found.weighted))


def test_a_head_that_cannot_be_fused_gives_the_same(monkeypatch):
    model, batch = build("untied"), batch_of()
    attach(model, rows=4)
    teacher_NV, lesson = teacher_and_lesson(batch, TeacherDivergence("reverse_kl", temperature=2.0))
    expected, _ = slow_loss(model, batch, lesson, teacher_NV, HALF)
    model.fused_head.fits = False
    found = measure_targets(model, batch, HALF, lesson=lesson)
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=1e-6)
    check_gradients(model, gradients(model, expected), gradients(model, found.weighted))


def test_a_refused_target_is_still_learned_from_the_teacher():
    model, batch = build("tied"), batch_of()
    attach(model, rows=4)
    nothing = TokenWeight(lambda loss_N, _: torch.full_like(loss_N, math.nan))
    teacher_NV, lesson = teacher_and_lesson(batch, TeacherDivergence())
    found = measure_targets(model, batch, nothing, lesson=lesson)
    expected = slow(lesson.divergence, target_logits(model, batch), teacher_NV).sum() * 0.7
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=1e-6)
    check_gradients(model, gradients(model, expected), gradients(model, found.weighted))


@pytest.mark.parametrize("on_head", [False, True])
def test_a_micro_batch_without_targets_has_a_loss_of_zero(on_head):
    model, batch = build("untied"), WITHOUT_TARGETS
    if on_head:
        config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    attach(model)
    _, lesson = teacher_and_lesson(batch, TeacherDivergence("jsd"))
    found = measure_targets(model, batch, lesson=lesson)
    assert found.weighted == 0 and found.weighted.requires_grad
    assert len(found.divergence_N) == 0
    found.weighted.backward()
