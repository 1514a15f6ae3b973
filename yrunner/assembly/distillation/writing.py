"""The student writes answers that the teacher judges (GKD; Agarwal et al., 2024, arXiv:2306.13649).

Which rows, and the random numbers of an answer, follow from seed, update and row: so a resumed run
writes the same, and so does any number of processes up to rounding.
"""

from collections.abc import Callable, MutableSequence, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from yrunner.data.batching.batches import Batch
from yrunner.data.batching.taught import (
    PLACES,
    UPDATE,
    TaughtBatches,
    TaughtExample,
    is_drawn,
    prompt_of_last_answer,
    with_answer,
)
from yrunner.evaluation.refilled import generate_answers
from yrunner.models.limits import max_positions
from yrunner.recipe.schema.eval import SampleWriting

AT_ONCE = 32
"""Answers written side by side."""


@dataclass(frozen=True)
class AnswerWriter:
    """How a student writes."""

    batches: TaughtBatches
    tokenizer: Any
    share: float
    """Of the rows of an update, on average."""
    seed: int
    max_new_tokens: int
    max_length: int
    """Tokens of a row, at most."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """The precision of the training."""

    def replace_rows(self, model: Any, batches: MutableSequence[Batch]) -> None:
        """Replace the micro-batches of an update that hold drawn rows."""
        drawn = {
            (number, place): (int(batch[UPDATE]), row)
            for number, batch in enumerate(batches)
            if UPDATE in batch
            for place, (row, _, _) in enumerate(batch[PLACES].tolist())
            if is_drawn(self.seed, int(batch[UPDATE]), row, self.share)
        }
        if not drawn:
            return
        rows = list(drawn.values())
        written = dict(zip(drawn, self._write(model, rows), strict=True))
        for number in {number for number, _ in drawn}:
            places = batches[number][PLACES].tolist()
            examples = [
                written.get((number, place)) or self.batches.train[row, 0]
                for place, (row, _, _) in enumerate(places)
            ]
            batches[number] = self.batches.collate(examples)

    def _write(self, model: Any, rows: Sequence[tuple[int, int]]) -> list[TaughtExample]:
        """The student's answers to rows, given with their update."""
        examples = [self.batches.train.examples[row] for _, row in rows]
        prompts = [prompt_of_last_answer(example) for example in examples]
        num_rows = len(self.batches.train)
        numbers = [update * num_rows + row for update, row in rows]
        answers: list[tuple[int, ...]] = [()] * len(rows)
        positions = max_positions(model)
        room = [min(self.max_new_tokens, positions - len(prompt)) for prompt in prompts]
        for most in sorted(set(room)):
            places = [place for place, each in enumerate(room) if each == most]
            with self.autocast():
                written = generate_answers(
                    model,
                    self.tokenizer,
                    [tuple(prompts[place]) for place in places],
                    max_new_tokens=most,
                    batch_size=AT_ONCE,
                    generation=SampleWriting(kind="sample", temperature=1.0),
                    seed=self.seed,
                    numbers=[numbers[place] for place in places],
                )
            for place, answer in zip(places, written, strict=True):
                answers[place] = answer.ids
        return [
            TaughtExample(
                with_answer(example, prompt, answer[: self.max_length - len(prompt)]),
                row,
                is_written=True,
            )
            for example, prompt, answer, (_, row) in zip(
                examples, prompts, answers, rows, strict=True
            )
        ]
