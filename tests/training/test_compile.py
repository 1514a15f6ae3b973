"""Compiled layers: the same losses, weights and names as without."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.losses.test_fused_head import NLIRG, batch_of, build, gradients, slow_targets
from tests.training.conftest import relative_difference
from yrunner.errors import MissingError
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.training.compile import check_compiler, compiled_layers
from yrunner.training.metrics import read_metrics

EVEN = [batch_of(length=17), batch_of(length=9)]
PACKED = batch_of(rows=1, length=30) | {"position_ids": torch.tensor([[*range(12), *range(18)]])}


def can_compile() -> bool:
    try:
        check_compiler()
    except MissingError:
        return False
    return True


@pytest.fixture
def capture_only(monkeypatch):
    """Let torch.compile capture graphs, which is where it can go wrong, but build no code."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def check_learning(model, reference, batches):
    """Value and gradient of every batch are those of the reference's full logits."""
    for batch in batches:
        targets = measure_targets(model, batch, NLIRG)
        weighted = slow_targets(reference, batch, NLIRG)[0]
        torch.testing.assert_close(targets.weighted, weighted, rtol=1e-4, atol=1e-5)
        expected = gradients(reference, weighted)
        for name, found in gradients(model, targets.weighted).items():
            name = name.removeprefix("_orig_mod.")
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_run_ends_at_the_same_weights_under_the_same_names(
    make_trainer, make_model, examples, capture_only
):
    found = []
    for compiles in (False, True):
        trainer = make_trainer(
            make_model(),
            examples[:8],
            examples[8:12],
            loss="nlirg",
            folder=f"compiled_{compiles}",
            torch_compile=compiles,
            max_steps=3,
            learning_rate=1e-3,
        )
        trainer.train()
        records = read_metrics(trainer.run_dir.metrics)
        losses = [record[key] for record in records for key in record if "loss" in key]
        [step] = trainer.run_dir.saved_steps()
        names = set(load_file(trainer.run_dir.checkpoint(step) / "model.safetensors"))
        found.append((trainer.model, losses, names))
    (plain, plain_losses, plain_names), (compiled, compiled_losses, compiled_names) = found
    assert compiled_losses == pytest.approx(plain_losses, rel=1e-5)
    assert relative_difference(plain, compiled) < 1e-6
    assert compiled_names == plain_names
    modules = compiled.base_model.modules()
    assert not any("forward" in vars(module) for module in modules), "generation is not compiled"


@pytest.mark.skipif(not can_compile(), reason="needs g++ and Python.h")
def test_code_that_was_built_learns_the_same():
    # Without a layer, which takes a minute to build, all before the head is compiled.
    model, reference = (build("tied", num_hidden_layers=0) for _ in range(2))
    attach(model, rows=4)
    with compiled_layers(model):
        check_learning(model, reference, EVEN)


def test_torch_compile_around_the_whole_model_learns_the_same(capture_only):
    model, reference = (build("untied", num_hidden_layers=0) for _ in range(2))
    attach(model, rows=4)
    check_learning(torch.compile(model, dynamic=True), reference, EVEN)


def test_packed_rows_stay_apart_when_compiled(capture_only):
    model, reference = (build("tied", num_hidden_layers=1) for _ in range(2))
    attach(model, rows=4)
    with compiled_layers(model):
        check_learning(model, reference, [PACKED])


def test_neither_new_lengths_nor_more_layers_are_compiled_again(capture_only):
    model = build("tied", num_hidden_layers=5)
    attach(model)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with compiled_layers(model):
        for length in (9, 13, 17, 30, 40):
            measure_targets(model, batch_of(length=length))
    # One while the fused head is tried out, without gradient, and one that learns.
    assert counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_one_sentence_says_what_to_add(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError) as error:
        check_compiler()
    assert "lacks g++" in str(error.value)
    assert "apt-get install g++" in str(error.value)
    assert error.value.exit_code == 3
