"""A model under evaluation: it answers questions, and gives the loss of texts."""

# N = target tokens of a reply

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from yrunner.data.chat.reply_text import answer_behind_thinking, opens_thinking
from yrunner.data.chat.template import read_turn_marks
from yrunner.data.chat.tokenize import Prompt, prompt_of, tokenize_conversations
from yrunner.data.conversation import Conversation, FaultyRow, Message, TokenizedExample
from yrunner.errors import DataError
from yrunner.evaluation.generate import GREEDY, Advance, Generated, is_random
from yrunner.evaluation.kept_results import KeptResults, Result
from yrunner.evaluation.parallel import share_out
from yrunner.evaluation.questions import CORRECT_THE_ROW, Question
from yrunner.evaluation.refilled import generate_answers
from yrunner.models.limits import max_positions
from yrunner.models.load import find_stop_ids
from yrunner.recipe.schema.eval import Generation
from yrunner.scoring.base_predictions import (
    CachedPredictions,
    cache_predictions,
    measure_divergences,
)
from yrunner.scoring.measure import score_tokens, sum_losses
from yrunner.tokens import IGNORE_INDEX

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Shows progress, given the total."""
NUM_LIKELIEST = 256
"""Of the base's tokens at each place, to measure how far another model is from it."""


def no_progress(_total: int) -> AbstractContextManager[Advance]:
    """No progress display."""
    return nullcontext(lambda _: None)


class Deferred:
    """A model that is loaded when it is first needed: kept results need none."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    @cached_property
    def model(self) -> Any:
        """The model."""
        return self._load()


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its tokenizer, and how it is asked."""

    model: Any
    """The model, or a `Deferred` one."""
    tokenizer: Any
    system: str | None = None
    """System message for questions without one."""
    batch_size: int = 64
    generation: Generation = GREEDY
    seed: int = 0
    progress: Progress = no_progress
    name: str = ""
    """What is measured, for the message about kept results."""
    written: list[Generated] = field(default_factory=list)
    """All answers so far."""
    kept: KeptResults | None = None
    """Where the results of a base are kept; None for all other models."""
    base: "EvaluatedModel | None" = None
    """The base that this model is compared with."""
    thinking_apart: bool = True
    """Whether an answer is what comes behind the model's thinking."""

    @property
    def loaded(self) -> Any:
        """The model itself."""
        return self.model.model if isinstance(self.model, Deferred) else self.model

    def recall(self, depends_on: Mapping[str, Any], measure: Callable[[], Result]) -> Result:
        """A kept result, or else what `measure` gives; it must be what JSON can hold."""
        return measure() if self.kept is None else self.kept.recall(self.name, depends_on, measure)

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Generated]:
        """The answer to each question, in order."""
        answers = self._answers(questions, max_new_tokens)
        if self.thinking_apart and questions:
            opened = opens_thinking(read_turn_marks(self.tokenizer).openings.get("user", ""))
            answers = [_behind_thinking(answer, opened=opened) for answer in answers]
        self.written.extend(answer for answer in answers if not answer.refused)
        return answers

    def _answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[Generated]:
        prompts = [prompt_of(each.messages, self.tokenizer, self.system) for each in questions]
        if self.kept is None:
            return self._write(prompts, max_new_tokens)
        depends_on = {
            "answers": self._encoded(prompts),
            "vocabulary": _vocabulary_key(self.tokenizer),
            "stop_ids": find_stop_ids(self.tokenizer),
            "max_new_tokens": max_new_tokens,
            "generation": self.generation.model_dump(mode="json"),
            "seed": self.seed if is_random(self.generation) else None,
        }
        rows = self.recall(
            depends_on, lambda: [asdict(each) for each in self._write(prompts, max_new_tokens)]
        )
        return [Generated(**{**row, "ids": tuple(row["ids"])}) for row in rows]

    def _encoded(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [
            self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if isinstance(prompt, str)
            else list(prompt)
            for prompt in prompts
        ]

    def _write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Generated]:
        def write(numbers: Sequence[int]) -> list[Generated]:
            with self.progress(len(numbers)) as advance:
                return generate_answers(
                    self.loaded,
                    self.tokenizer,
                    [prompts[number] for number in numbers],
                    max_new_tokens=max_new_tokens,
                    batch_size=self.batch_size,
                    generation=self.generation,
                    seed=self.seed,
                    numbers=numbers,
                    advance=advance,
                )

        return share_out(range(len(prompts)), write)

    def divergences(
        self, questions: Sequence[Question], max_new_tokens: int
    ) -> list[Tensor] | None:
        """KL(base || model) in nats at every token of the base's own answers, shape [N] each.

        A question that the base was not asked is left out. The base's `NUM_LIKELIEST` tokens count
        one by one, all others as one. None without a base, and where the two models have different
        vocabularies, or the answers do not fit into the model's positions.
        """
        base = self if self.base is None else self.base
        if self.base is None and self.kept is None:
            return None
        vocabularies = {_vocabulary_key(model.tokenizer) for model in (self, base)}
        examples = base._own_answers(questions, max_new_tokens)
        if len(vocabularies) > 1 or not examples:
            return None
        tops = base._predictions(examples)
        if base is self:
            return [torch.zeros(len(each.target_positions)) for each in examples]
        longest = max(len(example.input_ids) for example in examples)
        if longest > max_positions(self.loaded):
            return None

        def measure(chosen: Sequence[int]) -> list[Tensor]:
            return measure_divergences(
                self.loaded,
                examples,
                tops,
                pad_token_id=self.tokenizer.pad_token_id,
                max_tokens=self.batch_size * longest,
                chosen=chosen,
            )

        return share_out(range(len(examples)), measure)

    def _own_answers(
        self, questions: Sequence[Question], max_new_tokens: int
    ) -> list[TokenizedExample]:
        """The prompts with the model's answers as targets."""
        answers = self._answers(questions, max_new_tokens)
        prompts = self._encoded(
            [prompt_of(each.messages, self.tokenizer, self.system) for each in questions]
        )
        return [
            TokenizedExample(
                [*prompt, *answer.ids], [*[IGNORE_INDEX] * len(prompt), *answer.ids], each.origin
            )
            for prompt, answer, each in zip(prompts, answers, questions, strict=True)
            if answer.ids and prompt
        ]

    def _predictions(self, examples: Sequence[TokenizedExample]) -> CachedPredictions:
        """The model's likeliest tokens at every target."""

        def measure() -> CachedPredictions:
            return cache_predictions(
                self.loaded,
                examples,
                top=NUM_LIKELIEST,
                pad_token_id=self.tokenizer.pad_token_id,
                max_tokens=self.batch_size * max(len(each.input_ids) for each in examples),
            )

        if self.kept is None:
            return measure()
        depends_on = {"likeliest": NUM_LIKELIEST, "examples": _as_ids(examples)}
        return self.kept.recall_file(
            depends_on, measure, save=CachedPredictions.save, load=CachedPredictions.load
        )

    def losses(
        self, questions: Sequence[Question], replies: Sequence[str], window: int | None = None
    ) -> list[Tensor | None]:
        """The loss in nats of every token of each reply, end mark included, shape [N] each.

        None where question and reply do not fit into the model's positions. A reply without a
        question is a text: it is read in pieces of `window` tokens, and the first token of a piece
        has no loss.
        """
        examples = self._examples(list(zip(questions, replies, strict=True)))
        cut = [not question.messages for question in questions]
        depends_on = {"losses": _as_ids(examples), "cut": cut, "window": window}

        def measure() -> list[list[float] | None]:
            found = share_out(
                list(zip(examples, cut, strict=True)), lambda rows: self._losses(rows, window)
            )
            return [None if loss_N is None else loss_N.tolist() for loss_N in found]

        return [
            None if row is None else torch.tensor(row, dtype=torch.float32)
            for row in self.recall(depends_on, measure)
        ]

    def reply_costs(
        self, questions: Sequence[Question], replies: Sequence[Sequence[str]]
    ) -> list[list[float] | None]:
        """Minus the log-likelihood, in nats, of each reply to each question, end mark included.

        None for a question where a reply does not fit into the model's positions.
        """
        pairs = [
            (question, text)
            for question, texts in zip(questions, replies, strict=True)
            for text in texts
        ]
        examples = iter(self._examples(pairs))
        groups = [[next(examples) for _ in texts] for texts in replies]

        def measure() -> list[list[float] | None]:
            return share_out(groups, self._sum_losses)

        return self.recall({"costs": [_as_ids(group) for group in groups]}, measure)

    def _sum_losses(self, groups: Sequence[Sequence[TokenizedExample]]) -> list[list[float] | None]:
        room = max_positions(self.loaded)
        longest = [max(len(example.input_ids) for example in group) for group in groups]
        # Questions of similar length share a batch.
        order = sorted(range(len(groups)), key=lambda number: longest[number])
        fitting = [number for number in order if longest[number] <= room]
        found: list[list[float] | None] = [None] * len(groups)
        costs = sum_losses(
            self.loaded,
            [groups[number] for number in fitting],
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
        )
        with self.progress(len(fitting)) as advance:
            for number, row in zip(fitting, costs, strict=True):
                found[number] = row
                advance(1)
        return found

    def _losses(
        self, rows: Sequence[tuple[TokenizedExample, bool]], window: int | None
    ) -> list[Tensor | None]:
        room = max_positions(self.loaded)
        size = min(window or room, room)
        parts = [
            (number, part)
            for number, (example, is_text) in enumerate(rows)
            for part in (_pieces(example, size) if is_text else [example])
            if len(part.input_ids) <= room
        ]
        # Examples of similar length share a batch.
        parts.sort(key=lambda entry: len(entry[1].input_ids))
        losses: list[list[Tensor]] = [[] for _ in rows]
        scores = score_tokens(
            self.loaded,
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


def _behind_thinking(written: Generated, *, opened: bool) -> Generated:
    """What a model wrote, without its thinking; empty if that never ends."""
    answer = "" if written.refused else answer_behind_thinking(written.text, opened=opened)
    return replace(written, text=answer or "", unfinished=answer is None)


def _as_ids(examples: Sequence[TokenizedExample]) -> list[list[list[int]]]:
    return [[example.input_ids, example.labels] for example in examples]


@lru_cache(maxsize=8)
def _vocabulary_key(tokenizer: Any) -> str:
    """A hash of the texts of all ids: with the ids of a prompt, it says what the model reads."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: (word[1], word[0]))
    return sha256(json.dumps(words).encode()).hexdigest()


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
