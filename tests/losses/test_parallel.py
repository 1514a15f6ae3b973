"""The fused head in two processes against one process that makes all logits."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import run_together
from tests.losses.test_fused_head import NLIRG, batch_of, build, slow_targets
from yrunner.losses.fused_head import attach, measure_targets
from yrunner.tokens import IGNORE_INDEX

NUM_PROCESSES = 2
ADAPTERS = {
    "lora": dict(target_modules="all-linear"),
    "lora_on_head": dict(target_modules=["q_proj", "lm_head"]),
    "head_saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "head_only": dict(target_modules=["lm_head"]),
}
CASES = ["tied", "untied", "capped", *ADAPTERS]


def build_case(case: str) -> Any:
    """The same model in every process."""
    if case not in ADAPTERS:
        return build(case)
    model = build("untied")
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[case])
    return get_peft_model(model, config).eval()


def micro_batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """What a rank sees in one update; of the second micro-batch rank 1 has no target."""
    shares = [(0.6, 0.3), (0.2, 0.0)][rank]
    lengths = [(17, 9), (12, 15)][rank]
    pairs = zip(lengths, shares, strict=True)
    return [
        batch_of(seed=10 * rank + place, length=length, share=share)
        for place, (length, share) in enumerate(pairs)
    ]


def count_targets() -> int:
    batches = [batch for rank in range(NUM_PROCESSES) for batch in micro_batches(rank)]
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def trained_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def learn_in_parallel(rank: int, folder: Path) -> None:
    """Value and gradient of one update of every case, summed up by DDP."""
    for case in CASES:
        model = build_case(case)
        attach(model, rows=4)
        parallel = DistributedDataParallel(model)
        value = torch.zeros(())
        for place, batch in enumerate(micro_batches(rank)):
            # DDP sums up in the last micro-batch of an update, as under Trainer.
            with parallel.no_sync() if place == 0 else nullcontext():
                targets = measure_targets(parallel, batch, NLIRG)
                loss = targets.weighted / count_targets()
                # DDP takes the mean over ranks; the sum is wanted.
                (loss * NUM_PROCESSES).backward()
            value += loss.detach()
        dist.all_reduce(value)
        if rank == 0:
            torch.save((value, trained_gradients(model)), folder / f"{case}.pt")


@pytest.fixture(scope="module")
def found_in_parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    run_together(learn_in_parallel, folder, number=NUM_PROCESSES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_with_all_logits_does(case: str, found_in_parallel: Path):
    model = build_case(case)
    value = torch.zeros(())
    for batch in [batch for rank in range(NUM_PROCESSES) for batch in micro_batches(rank)]:
        loss = slow_targets(model, batch, NLIRG)[0] / count_targets()
        loss.backward()
        value += loss.detach()
    found_value, found = torch.load(found_in_parallel / f"{case}.pt")
    torch.testing.assert_close(found_value, value, rtol=1e-5, atol=1e-6)
    expected = trained_gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * size + 1e-8)
