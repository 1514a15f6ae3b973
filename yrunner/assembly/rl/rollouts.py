"""What an rl run needs besides a model: who writes the answers, who judges them, who notes them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerState

from yrunner.data.batching.rollouts import Rollout
from yrunner.data.chat.reply_text import opened_thinking
from yrunner.data.chat.template import read_turn_marks
from yrunner.data.dataset.prompts import PromptRow
from yrunner.distributed.collectives import this_rank
from yrunner.evaluation.refilled import SeededPrompt, answers_as_they_end
from yrunner.recipe.schema.eval import SampleWriting
from yrunner.recipe.schema.rl import RolloutSection
from yrunner.rewards.completion import Completion, Reward, total_rewards
from yrunner.storage.run_dir import write_text
from yrunner.training.rl.batches import RolloutBuffer
from yrunner.training.rl.collect import AskedPrompt, WrittenAnswer


def write_answers(
    model: Any,
    tokenizer: Any,
    rollout: RolloutSection,
    asked: Sequence[AskedPrompt],
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> list[WrittenAnswer] | None:
    """An answer to each prompt, in order; None once `is_over`.

    The longest prompts come first, so that prompts of a batch have similar lengths.
    """
    prompts = [SeededPrompt(each.ids, each.seed) for each in asked]
    waiting = sorted(prompts, key=lambda prompt: len(prompt.text))
    written = {
        prompt: WrittenAnswer(
            list(answer.ids), answer.text, answer.num_tokens, is_truncated=not answer.stopped
        )
        for prompt, answer in answers_as_they_end(
            model,
            tokenizer,
            lambda: waiting.pop() if waiting else None,
            max_new_tokens=rollout.max_new_tokens,
            batch_size=rollout.batch_size,
            generation=SampleWriting(kind="sample", temperature=rollout.temperature),
            is_over=is_over,
        )
    }
    return None if is_over() else [written[prompt] for prompt in prompts]


def completions_of(
    tokenizer: Any, rows: Sequence[PromptRow], answers: Sequence[WrittenAnswer]
) -> list[Completion]:
    """Each answer as rewards see it."""
    opening = opened_thinking(read_turn_marks(tokenizer).openings.get("user", ""))
    return [
        Completion(
            row.messages,
            opening + answer.text,
            row.columns,
            row.origin,
            answer.num_tokens,
            answer.is_truncated,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def score_answers(
    tokenizer: Any,
    rewards: Sequence[Reward],
    rows: Sequence[PromptRow],
    answers: Sequence[WrittenAnswer],
) -> tuple[list[list[float | None]], list[float | None]]:
    """The scores of each answer by every reward, and their weighted sum."""
    completions = completions_of(tokenizer, rows, answers)
    parts = [reward.score(completions) for reward in rewards]
    totals = total_rewards(parts, [reward.weight for reward in rewards])
    return [list(scores) for scores in zip(*parts, strict=True)], totals


def read_rollouts(file: Path) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl or rollout_tokens.jsonl; none if it is missing."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the run is writing it, or was killed at it
    return found


class RolloutsFile(TrainerCallback):
    """Appends every collected answer to rollouts.jsonl."""

    def __init__(
        self, path: Path, rewards: Sequence[str], buffer: RolloutBuffer, rollout: RolloutSection
    ) -> None:
        """`rewards`: their names. `buffer`: the answers that are learned from."""
        self.path = path
        self.rewards = list(rewards)
        self.buffer = buffer
        self.generations, self.passes = rollout.generations, rollout.updates_per_rollout

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget the cycles after that of the checkpoint that a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        last = -1 if self.buffer.cycle is None else self.buffer.cycle
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _cycle_of(line) <= last]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def note(self, cycle: int, found: Sequence[tuple[Rollout, PromptRow]]) -> None:
        """Append the answers of a cycle."""
        if this_rank() != 0:
            return
        lines = [
            json.dumps(self._entry(cycle, rollout, prompt), ensure_ascii=False)
            for rollout, prompt in found
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def _entry(self, cycle: int, rollout: Rollout, prompt: PromptRow) -> dict[str, Any]:
        return {
            "cycle": cycle,
            "update": cycle * self.passes + 1,
            "file": prompt.origin.file.name,
            "row": prompt.origin.row,
            "generation": rollout.number % self.generations,
            "prompt": prompt.messages[-1].content,
            "text": rollout.text,
            "tokens": rollout.num_tokens,
            "is_truncated": rollout.is_truncated,
            "rewards": dict(zip(self.rewards, rollout.scores, strict=True)),
            "reward": rollout.reward,
            **({} if rollout.values is None else {"value": fmean(rollout.values)}),
            "advantage": rollout.advantage,
            "fate": rollout.fate,
        }


def _cycle_of(line: str) -> float:
    """The cycle of a line; beyond all others for one that a kill has cut off."""
    try:
        return float(json.loads(line)["cycle"])
    except ValueError:
        return float("inf")
