"""The fused head under DeepSpeed ZeRO, in two processes, against one that makes all logits."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.processes import run_together
from tests.losses.test_fused_head import NLIRG, slow_targets
from tests.losses.test_parallel import ADAPTERS, NUM_PROCESSES, build_case, micro_batches
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.losses.log_probs import measure_log_probs
from yrunner.tokens import IGNORE_INDEX

WAYS = ("weighted", "log_probs")
CASES = [(3, case, way) for case in ["tied", "untied", "odd", *ADAPTERS] for way in WAYS]
CASES += [
    (stage, case, way)
    for stage in (1, 2)
    for case in ["tied", "lora", "lora_on_head"]
    for way in WAYS
]
BATCH_OF_UPDATE = (0, 1, 0)
"""Which of a rank's batches an update learns from; of the second, rank 1 has no target."""


def zero_settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # By default weights as small as these would not be split over the ranks.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def build_zero_case(case: str) -> Any:
    if case != "odd":
        return build_case(case)
    model = build_case("untied")
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Logits that head and form do not make: such a model falls back to all of them."""
        outputs = original(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    model.forward = forward
    return model


def sgd(model: Any) -> torch.optim.Optimizer:
    """Weights move by the gradient itself."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def count_targets(place: int) -> int:
    batches = [micro_batches(rank)[place] for rank in range(NUM_PROCESSES)]
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def of_log_probs(log_prob_N: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient at a target depends on its log-probability."""
    return (log_prob_N.exp() - 0.3 * log_prob_N).sum()


def learn_under_zero(rank: int, folder: Path) -> None:
    """Losses of the updates and weights after them, of every case."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would be compiled for most of a minute, only to be faster than gloo.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("gloo")
    for stage, case, way in CASES:
        found = learn_case(deepspeed, stage, case, way, rank)
        if rank == 0:
            torch.save(found, folder / f"{stage}_{case}_{way}.pt")


def learn_case(
    deepspeed: Any, stage: int, case: str, way: str, rank: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build_zero_case(case)
    known_to_transformers = HfDeepSpeedConfig(zero_settings(stage))
    attach(model, rows=4)
    del known_to_transformers
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=sgd(model), config=zero_settings(stage)
    )
    losses = []
    for place in BATCH_OF_UPDATE:
        assert stage < 3 or all(parameter.numel() == 0 for parameter in model.parameters())
        batch = micro_batches(rank)[place]
        if way == "weighted":
            total = measure_targets(engine, batch, NLIRG).weighted
        else:
            total = of_log_probs(measure_log_probs(engine, batch).log_prob_N)
        loss = total / count_targets(place)
        # ZeRO takes the mean over ranks; the sum is wanted.
        engine.backward(loss * NUM_PROCESSES)
        engine.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(loss.item())
    gather = deepspeed.zero.GatheredParameters if stage == 3 else nullcontext
    with gather(list(model.parameters())):
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return losses, weights


@pytest.fixture(scope="module")
def found_under_zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_together(learn_under_zero, folder, number=NUM_PROCESSES)
    return folder


@pytest.mark.parametrize(("stage", "case", "way"), CASES)
def test_zero_learns_what_one_process_with_all_logits_does(
    stage: int, case: str, way: str, found_under_zero: Path
):
    model = build_zero_case(case)
    optimizer = sgd(model)
    losses, weights = torch.load(found_under_zero / f"{stage}_{case}_{way}.pt")
    for place, found in zip(BATCH_OF_UPDATE, losses, strict=True):
        batches = [micro_batches(rank)[place] for rank in range(NUM_PROCESSES)]
        slow = [slow_targets(model, batch, NLIRG) for batch in batches]
        totals = [
            weighted if way == "weighted" else of_log_probs(-loss_N)
            for weighted, loss_N, *_ in slow
        ]
        loss = sum(totals) / count_targets(place)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = dict(model.named_parameters())
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-4, atol=1e-5)
