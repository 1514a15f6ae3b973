"""Two real processes learn what one does, plainly and under DeepSpeed; `benchmarks.ranks` has all.

The model, the rows and the settings are those of the benchmark, which compares every combination.
"""

import math
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.ranks.cases import DRIFT_ROWS, TRAIN_ROWS, VOCABULARY, Case, Result, write_base
from benchmarks.ranks.training import load_result, start_processes, train_case
from tests.rounding import rounding
from yrunner.data.batching.plan import make_plan

CASES = [
    Case("ddp", "nlirg", "packed", "full"),
    Case("ddp", "nlirg_by_weights", "token_batches", "lora"),
    Case("zero1", "plain", "packed", "lora"),
    Case("zero2", "nlirg_by_weights", "token_batches", "full"),
    Case("zero3", "nlirg", "alone", "full"),
    Case("zero3", "nlirg_by_weights", "token_batches", "lora"),
    Case("zero3_offload", "plain", "packed", "full"),
]
HALF = [
    Case("zero1", "nlirg_by_weights", "token_batches", "lora", "bfloat16"),
    Case("zero2", "nlirg_by_weights", "packed", "full", "bfloat16"),
    Case("zero3", "plain", "packed", "full", "bfloat16"),
    Case("zero3", "nlirg", "alone", "lora", "bfloat16"),
]
KEPT = [
    Case("ddp", "nlirg", "packed", "full", keep="one_row"),
    Case("ddp", "nlirg", "token_batches", "lora", keep="replay"),
    Case("zero1", "plain", "packed", "lora", keep="ewc"),
    Case("zero2", "nlirg", "alone", "full", keep="replay"),
    Case("zero3", "nlirg", "packed", "lora", keep="one_row"),
    Case("zero3", "plain", "alone", "full", keep="text"),
]
"""What a model is held to; of one kept row in an update, one of the processes has nothing."""
PREFERRED = [
    Case("ddp", "dpo", "packed", "full"),
    Case("ddp", "kto", "alone", "lora"),
    Case("zero1", "orpo", "packed", "lora"),
    Case("zero2", "kto", "alone", "full"),
    Case("zero3", "dpo", "alone", "lora"),
    Case("zero3", "kto", "packed", "full"),
    Case("ddp", "bradley_terry", "packed", "lora"),
    Case("zero1", "bradley_terry", "alone", "full"),
    Case("zero2", "bradley_terry", "packed", "lora"),
    Case("zero3", "bradley_terry", "alone", "full"),
]
"""Under an adapter the reference is the base beneath it, otherwise its log-probabilities."""
TAUGHT = [
    Case("ddp", "nlirg", "packed", "full", teacher="live"),
    Case("ddp", "plain", "token_batches", "lora", teacher="stored"),
    Case("zero1", "nlirg_by_weights", "packed", "lora", teacher="stored"),
    Case("zero2", "nlirg", "alone", "lora", teacher="live"),
    Case("zero3", "plain", "packed", "lora", teacher="live"),
    Case("zero3", "nlirg", "alone", "full", teacher="stored"),
]
"""A teacher is whole in each process, whatever shards the student."""
REWARDED = [
    Case("ddp", "rloo", "alone", "lora"),
    Case("zero1", "dapo", "alone", "lora"),
    Case("zero2", "grpo", "alone", "full"),
    Case("zero3", "grpo", "alone", "lora"),
    Case("zero3", "rloo", "alone", "full"),
]
"""Every process writes a share of the answers, with all weights."""
RESUMED = [CASES[0], CASES[3], CASES[4], CASES[5], PREFERRED[3], PREFERRED[4], TAUGHT[4]]
RESUMED += [REWARDED[2], REWARDED[3]]
UPDATE = 3
"""After it there is a checkpoint, and all cases go on."""
NUM_WATCHED = sum(len(example.target_positions) for example in DRIFT_ROWS)
DRIFT_ROUNDING = rounding(math.log(VOCABULARY), NUM_WATCHED) / NUM_WATCHED
"""Of a mean of small differences of logarithms, which are as large as that of the vocabulary."""
KEPT_ROUNDING = dict.fromkeys(("replay", "one_row"), rounding(math.log(VOCABULARY)))
"""The same of the divergence of a single target: an update may hold the model to no more."""
WEIGHT_GAP = 1e-4
"""Adam divides each gradient by its own size. Of n weights, the parts of one gradient cancel to
about 1/n, so that their rounding is n times as large in its step: rate * eps * sqrt(parts) * n =
1e-2 * 1e-7 * 10 * 2e4, that is 1e-5 of the norm of all weights, in each of at most 20 updates.
If one row of the 19 is another, the gap is 4e-2."""


@cache
def alone(case: Case, folder: Path) -> Result:
    """The same in one process, without sharing anything."""
    return train_case(case.alone, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases were trained by two processes."""
    path = tmp_path_factory.mktemp("ranks")
    write_base(path / "base")
    start_processes(CASES + HALF + KEPT + PREFERRED + TAUGHT + REWARDED, path)
    return path


@pytest.fixture(scope="module")
def resumed_by_one(folder: Path) -> dict[str, Result]:
    """What one process came to that went on where two had saved."""
    # What the two have found is written over: it may not be taken for the result.
    shutil.copytree(folder, copy := folder.with_name("resumed"))
    for result in copy.glob("*.pt"):
        result.unlink()
    start_processes(RESUMED, copy, number=1, resume_at=UPDATE)
    return {case.name: load_result(case, copy) for case in RESUMED}


@pytest.mark.parametrize(
    "case", CASES + KEPT + PREFERRED + TAUGHT + REWARDED, ids=lambda case: case.name
)
def test_two_processes_come_to_the_losses_and_weights_of_one(case: Case, folder: Path):
    reference = alone(case, folder)
    found = load_result(case, folder)
    assert len(reference.losses) > (UPDATE if case in PREFERRED else 2 * UPDATE)
    assert reference.loss_gap(found) < 1e-5
    assert reference.weight_gap(found) < WEIGHT_GAP
    assert found.drifts == pytest.approx(reference.drifts, rel=1e-3, abs=DRIFT_ROUNDING)
    assert 0 < found.drifts[0] and (case not in CASES or found.drifts[0] < found.drifts[-1])
    assert found.kept == pytest.approx(reference.kept, rel=1e-3, abs=KEPT_ROUNDING.get(case.keep))
    assert found.taught == pytest.approx(reference.taught, rel=1e-4)
    assert bool(found.taught) == (case in TAUGHT)
    assert bool(found.kept) == (case in KEPT) and all(kept > 0 for kept in found.kept[-2:])


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_in_bfloat16_deepspeed_comes_close_to_one_process_and_keeps_weights_in_float32(
    case: Case, folder: Path
):
    """DeepSpeed computes with rounded weights and sums rounded gradients; torch's autocast not."""
    reference, found = alone(case, folder), load_result(case, folder)
    assert reference.loss_gap(found) < 5e-3
    assert reference.weight_gap(found) < 5e-2
    trained = [tensor for name, tensor in found.weights.items() if _is_trained(name, case)]
    assert {tensor.dtype for tensor in trained} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in trained)


def _is_trained(name: str, case: Case) -> bool:
    return case.tuning == "full" or "lora" in name


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_another_number_of_processes_goes_on_to_the_same_weights(
    case: Case, folder: Path, resumed_by_one: dict[str, Result]
):
    assert alone(case, folder).weight_gap(resumed_by_one[case.name]) < WEIGHT_GAP


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("order", ["shuffle", "as_written"])
@pytest.mark.parametrize("token_batch", [0, 4])
def test_every_group_is_in_exactly_one_process_and_all_do_as_many_steps(
    num_ranks, order, token_batch
):
    plan = make_plan(
        [len(example.target_positions) for example in TRAIN_ROWS],
        token_batch=token_batch,
        batch_size=2,
        accumulation=2 * num_ranks,
        epochs=2,
        max_updates=None,
        order=order,
        seed=0,
        lengths=[len(example.input_ids) for example in TRAIN_ROWS],
    )
    shares = [list(plan.share(rank, num_ranks)) for rank in range(num_ranks)]
    each = plan.num_updates * plan.num_micro_batches // num_ranks
    assert {len(share) for share in shares} == {each}
    seen = Counter(slice_ for share in shares for rows in share for row in rows for slice_ in row)
    assert seen == Counter(slice_ for rows in plan for row in rows for slice_ in row)
    # An update of all processes is one of the plan, not parts of two.
    for update, rows in enumerate(plan.updates()):
        at = slice(2 * update, 2 * update + 2)
        together = [row for share in shares for batch in share[at] for row in batch]
        assert sorted(together) == sorted(rows)
