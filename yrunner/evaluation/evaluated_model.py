"""A model under evaluation: it answers questions, and gives the loss of texts."""

# N = target tokens of a reply

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yrunner.data.chat.tokenize import prompt_of, tokenize_conversations
from yrunner.data.conversation import Conversation, FaultyRow, Message, TokenizedExample
from yrunner.errors import DataError
from yrunner.evaluation.generate import GREEDY, Advance, Generated, generate_answers, max_positions
from yrunner.evaluation.parallel import share_out
from yrunner.evaluation.questions import CORRECT_THE_ROW, Question
from yrunner.recipe.schema.eval import Generation
from yrunner.scoring.measure import score_tokens
from yrunner.tokens import IGNORE_INDEX

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Shows progress, given the total."""


def no_progress(_total: int) -> AbstractContextManager[Advance]:
    """No progress display."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its tokenizer, and how it is asked."""

    model: Any
    tokenizer: Any
    system: str | None = None
    """System message for questions without one."""
    batch_size: int = 64
    generation: Generation = GREEDY
    seed: int = 0
    progress: Progress = no_progress
    written: list[Generated] = field(default_factory=list)
    """All answers so far."""

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Generated]:
        """The answer to each question, in order."""

        def write(numbers: Sequence[int]) -> list[Generated]:
            prompts = [
                prompt_of(questions[number].messages, self.tokenizer, self.system)
                for number in numbers
            ]
            with self.progress(len(prompts)) as advance:
                return generate_answers(
                    self.model,
                    self.tokenizer,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    batch_size=self.batch_size,
                    generation=self.generation,
                    seed=self.seed,
                    numbers=numbers,
                    advance=advance,
                )

        answers = share_out(range(len(questions)), write)
        self.written.extend(answer for answer in answers if not answer.refused)
        return answers

    def losses(
        self, questions: Sequence[Question], replies: Sequence[str], window: int | None = None
    ) -> list[Tensor | None]:
        """The loss in nats of every token of each reply, end mark included, shape [N] each.

        None where question and reply do not fit into the model's positions. A reply without a
        question is a text: it is read in pieces of `window` tokens, and the first token of a piece
        has no loss.
        """
        pairs = list(zip(questions, replies, strict=True))
        return share_out(pairs, partial(self._losses, window=window))

    def _losses(
        self, pairs: Sequence[tuple[Question, str]], window: int | None
    ) -> list[Tensor | None]:
        room = max_positions(self.model)
        size = min(window or room, room)
        parts = [
            (number, part)
            for number, ((question, _), example) in enumerate(
                zip(pairs, self._examples(pairs), strict=True)
            )
            for part in ([example] if question.messages else _pieces(example, size))
            if len(part.input_ids) <= room
        ]
        # Examples of similar length share a batch.
        parts.sort(key=lambda entry: len(entry[1].input_ids))
        losses: list[list[Tensor]] = [[] for _ in pairs]
        scores = score_tokens(
            self.model,
            [part for _, part in parts],
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
        )
        with self.progress(len(parts)) as advance:
            for (number, _), scored in zip(parts, scores, strict=True):
                losses[number].append(scored.loss_N)
                advance(1)
        return [torch.cat(found) if found else None for found in losses]

    def _examples(self, pairs: Sequence[tuple[Question, str]]) -> list[TokenizedExample]:
        conversations = [
            Conversation(_messages(question, reply), question.origin) for question, reply in pairs
        ]
        results = tokenize_conversations(
            conversations, self.tokenizer, system=self.system, targets="last_assistant"
        )
        examples = []
        for result, conversation in zip(results, conversations, strict=True):
            if isinstance(result, FaultyRow):
                raise DataError(conversation.origin, str(result), remedy=CORRECT_THE_ROW)
            examples.append(result)
        return examples


def _messages(question: Question, reply: str) -> tuple[Message, ...]:
    if not question.messages:
        return (Message("text", reply),)
    return (*question.messages, Message("assistant", reply))


def _pieces(text: TokenizedExample, size: int) -> list[TokenizedExample]:
    """The text in pieces of `size` tokens; a last piece of one token, which has no loss, is cut."""
    starts = range(0, max(1, len(text.input_ids) - 1), size)
    return [
        TokenizedExample(
            text.input_ids[start : start + size],
            [IGNORE_INDEX, *text.labels[start + 1 : start + size]],
            text.origin,
        )
        for start in starts
    ]
