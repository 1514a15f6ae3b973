"""A rehearsal tries what is largest, and the run is the same bit for bit."""

import pytest
import torch

from tests.training.conftest import checkpoint_every, weights_of
from tests.training.test_resume import records, with_lora
from yrunner.training.memory import oom_probe as rehearsal


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(rehearsal, "WORTH_IT", 0)


def make(make_trainer, make_model, examples, folder, lora, optimizer="adamw_torch", **keys):
    model = with_lora(make_model()) if lora else make_model()
    return make_trainer(
        model,
        examples[8:20],
        examples[:4],
        loss="nlirg",
        folder=folder,
        batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        optimizer=optimizer,
        trackers=["tensorboard"],
        checkpoint=checkpoint_every(4),
        **keys,
    )


@pytest.mark.parametrize(
    ("lora", "optimizer"), [(True, "adamw_torch"), (False, "adafactor"), (False, "sgd")]
)
def test_the_run_is_the_same_with_and_without_a_rehearsal(
    make_model, examples, make_trainer, monkeypatch, lora, optimizer
):
    plain = make(make_trainer, make_model, examples, "plain", lora, optimizer)
    plain.train()
    monkeypatch.setattr(rehearsal, "WORTH_IT", 0)
    tried = make(make_trainer, make_model, examples, "tried", lora, optimizer)
    widths = []
    tried.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].numel())
    )
    tried.train()
    widths = [width for width in widths if width > 8]  # the loss tries the model with a few tokens
    assert len(widths) == 6 + 2 * 2 + 2, "six updates, two validations, one of each rehearsed"
    assert widths[0] == max(widths[0], *widths[2:]), "the largest comes first"
    assert torch.equal(weights_of(plain.model), weights_of(tried.model))
    assert records(plain) == records(tried)
    assert not list(tried.run_dir.checkpoints.glob(".*")), "what it saved is gone"


def test_a_lack_of_memory_shows_before_the_first_update(make_model, examples, make_trainer, always):
    trainer = make(make_trainer, make_model, examples, "run", lora=False)
    longest = max(len(example.input_ids) for example in examples[8:20])

    def be_short(module, inputs, output):
        if inputs[0].shape[1] >= longest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.get_input_embeddings().register_forward_hook(be_short)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainer.run_dir.saved_steps() == []


def test_a_resumed_run_keeps_what_its_optimizer_knows(make_model, examples, make_trainer, always):
    undisturbed = make(make_trainer, make_model, examples, "undisturbed", lora=False)
    undisturbed.train()
    # The undisturbed run left a checkpoint after update 4 of 6; the same run goes on from it.
    again = make(make_trainer, make_model, examples, "undisturbed", lora=False)
    again.train(again.run_dir.checkpoint(4))
    assert torch.equal(weights_of(undisturbed.model), weights_of(again.model))
