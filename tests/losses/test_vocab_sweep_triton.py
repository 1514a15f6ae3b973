"""The Triton kernel against torch, on a GPU or in Triton's interpreter (see conftest.py)."""

from dataclasses import fields

import pytest
import torch

from yrunner.losses.vocab_sweep import LogitForm, sweep

pytest.importorskip("triton", reason="Triton comes with torch's CUDA build")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def sweep_on_gpu(monkeypatch):
    """The kernel with small blocks: several for a row."""
    # Imported here: Triton may be missing.
    from yrunner.losses import vocab_sweep_triton

    monkeypatch.setattr(vocab_sweep_triton, "LARGEST_BLOCK", 64)
    return vocab_sweep_triton.sweep_on_gpu


def batch_of(vocabulary_size, dtype, size=3.0, rows=5):
    generator = torch.Generator().manual_seed(vocabulary_size)
    logits_NV = size * torch.randn(rows, vocabulary_size, generator=generator)
    labels_N = torch.randint(vocabulary_size, (rows,), generator=generator)
    logits_NV[0, labels_N[0]] = 40.0  # mastered
    logits_NV[1, labels_N[1]] = -60.0  # hopeless
    return logits_NV.to(DEVICE, dtype), labels_N.to(DEVICE)


@pytest.mark.parametrize("vocabulary_size", [2, 63, 64, 65, 1000])
@pytest.mark.parametrize(
    "form", [LogitForm(), LogitForm(0.25), LogitForm(softcap=5.0), LogitForm(2.0, 30.0)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_finds_what_torch_finds(sweep_on_gpu, vocabulary_size, form, dtype):
    logits_NV, labels_N = batch_of(vocabulary_size, dtype)
    expected, expected_grad_NV = sweep(logits_NV.to(torch.float32, copy=True), labels_N, form)
    found, grad_NV = sweep_on_gpu(logits_NV, labels_N, form)
    for field in fields(found):
        mine, theirs = (getattr(one, field.name) for one in (found, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5, msg=field.name)
    assert grad_NV.data_ptr() == logits_NV.data_ptr(), "in place"
    torch.testing.assert_close(
        grad_NV.float(), expected_grad_NV, rtol=0, atol=4e-3 if dtype == torch.bfloat16 else 1e-6
    )
