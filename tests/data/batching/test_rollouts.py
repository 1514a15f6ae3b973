"""The plan of a run on rewards, and what stands beside the tokens of its answers."""

from pathlib import Path

import pytest
import torch

from yrunner.data.batching.collate import all_in_one_row, one_per_row
from yrunner.data.batching.rollouts import (
    Rollout,
    as_example,
    collate_rollouts,
    longest_example,
    make_rollout_plan,
)
from yrunner.data.dataset.prompts import PromptRow
from yrunner.errors import Origin
from yrunner.tokens import IGNORE_INDEX


def plan(num_prompts=7, passes=1, **keys):
    settings = {"epochs": 2, "order": "shuffle", "seed": 0, "max_updates": None} | keys
    return make_rollout_plan(
        list(range(5, 5 + num_prompts)),
        generations=4,
        max_new_tokens=10,
        passes=passes,
        micro_batch_size=3,
        num_micro_batches=4,
        **settings,
    )


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("num_prompts", [1, 3, 7, 9])
def test_every_group_is_whole_and_comes_once_per_epoch(num_prompts, passes):
    made = plan(num_prompts, passes)
    updates = [[answer for row in update for answer, _ in row] for update in made.updates()]
    cycles = -(-num_prompts // 3)
    assert len(updates) == made.num_updates == 2 * cycles * passes
    assert made.epoch_ends == [cycles * passes, 2 * cycles * passes]
    for start in range(0, len(updates), passes):
        cycle = updates[start : start + passes]
        assert all(update == cycle[0] for update in cycle)
        prompts = [made.data_row(answer) for answer in cycle[0]]
        assert all(prompts.count(prompt) == 4 for prompt in prompts)
    epoch = [answer for update in updates[: cycles * passes : passes] for answer in update]
    assert sorted(epoch) == list(range(4 * num_prompts))


def test_the_run_may_end_within_a_cycle():
    made = plan(passes=3, max_updates=5)
    assert made.num_updates == len(list(made.updates())) == 5
    assert made.rows_of_an_update == 12


def test_the_largest_micro_batch_has_the_longest_prompts_with_the_longest_answers():
    made = plan(num_prompts=3)
    rows = made.largest_micro_batch()
    assert [made.data_row(answer) for row in rows for answer, _ in row] == [2, 2, 2]


PROMPT = PromptRow([11, 12], (), {}, Origin(Path("rows.jsonl"), 1))


def rollout(number, ids, **more):
    return Rollout(number, ids, "", len(ids), False, [1.0], advantage=float(number), **more)


@pytest.mark.parametrize("layout", [one_per_row, all_in_one_row, lambda _: [[1], [2, 0]]])
def test_what_stands_beside_the_tokens_follows_them_into_any_layout(layout):
    answers = [[20], [30, 31, 32], [40, 41]]
    examples = [
        as_example(
            PROMPT,
            rollout(
                number,
                ids,
                share=0.1 * number,
                old=[token / 10 for token in ids],
                reference=[token / 100 for token in ids],
            ),
            is_first_pass=False,
        )
        for number, ids in enumerate(answers)
    ]
    batch = collate_rollouts(examples, 0, layout)
    target_N = batch["labels"][batch["labels"] != IGNORE_INDEX]
    assert torch.equal(batch["old_N"], target_N.double() / 10)
    assert torch.equal(batch["reference_N"], target_N.double() / 100)
    of_answer_N = target_N // 10 - 2
    assert torch.equal(batch["answer_N"], of_answer_N)
    assert batch["advantage_S"].tolist() == [0, 1, 2]
    assert batch["share_S"].tolist() == pytest.approx([0, 0.1, 0.2])


def test_the_first_pass_compares_the_model_with_itself():
    example = as_example(PROMPT, rollout(0, [5], old=[-1.0]), is_first_pass=True)
    assert example.old is None
    assert "old_N" not in collate_rollouts([example], 0, one_per_row)


def test_a_batch_without_answers_has_no_target():
    batch = collate_rollouts([], 0, one_per_row)
    assert (batch["labels"] == IGNORE_INDEX).all() and len(batch["share_S"]) == 0


def test_what_an_answer_may_cost_is_tried_with_the_longest():
    example = longest_example(PROMPT, 6, reference=True)
    assert len(example.example.input_ids) == 8 and len(example.reference) == 6
